"""Which Ray cluster a server runs on, and that only one server has it."""
