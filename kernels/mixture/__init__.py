"""What surrounds the routed experts of a layer: router, shared expert, and adding all to the residual."""
