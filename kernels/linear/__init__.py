"""Matrix product with a stored weight."""
