"""Drawing tokens from logits: filters, and noise that depends on (seed, position, token) alone."""
