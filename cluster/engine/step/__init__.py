"""One step: its plan, its tensors, its drafts and the choice of its tokens."""
