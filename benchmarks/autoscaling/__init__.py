"""A simulation of how many attention workers there are, and what that does to queues: `autoscaling`."""
