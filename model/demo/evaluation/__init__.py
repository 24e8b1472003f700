"""What a served model gets right on held-out conversations, asked over HTTP."""
