"""What steps take, by what is in them: measured, interpolated, and kept up to date. Plain Python."""
