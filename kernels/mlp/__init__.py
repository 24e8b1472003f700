"""Dense SwiGLU."""
