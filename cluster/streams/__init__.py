"""Requests and token events between ingresses and attention workers, over one connection each. No Ray, no torch."""
