"""The lockstep loops of workers and shards, and what other threads tell them. Knows no Ray."""
