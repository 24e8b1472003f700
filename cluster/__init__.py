"""Requests, scheduling and the engine of an attention worker; the gang, its dispatchers and its Ray actors."""
