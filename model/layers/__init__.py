"""The parts of a decoder layer. Each is a function of its weights, its memory and the step's rows."""
