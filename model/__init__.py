"""The Qwen3-Next architecture: configuration, checkpoint, layers, text."""
