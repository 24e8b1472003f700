"""Gated attention over a paged KV pool."""
