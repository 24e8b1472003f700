"""Grammars of answers: compiled, checked and bounded, in a process that may be killed."""
