"""From a body to what the engine gets, and how its answer is to be read."""
