"""Messages between processes through memory that they share."""
