"""Carrying tokens to the experts: in one process, or by broadcast to expert shards over a process group."""
