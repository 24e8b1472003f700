"""What the Triton kernels share: the chips they are configured for, jit helpers, and the class that binds them."""
