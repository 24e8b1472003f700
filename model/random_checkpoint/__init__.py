"""Seeded random checkpoints with a tokenizer, in the published file format: for tests, demos and load runs."""

from divisi.model.random_checkpoint.checkpoint import SMALL_CONFIG, write_random_checkpoint

__all__ = ["SMALL_CONFIG", "write_random_checkpoint"]
