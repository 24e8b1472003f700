"""What it costs to have the experts elsewhere."""
