"""What a request may say: its fields, their bounds, and the way from bytes to a body."""
