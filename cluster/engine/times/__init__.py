"""What steps take: measured at the first start, kept for the next."""
