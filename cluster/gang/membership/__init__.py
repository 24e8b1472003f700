"""Who belongs to a gang: seats, epochs, leases, and the watch over processes. Knows no Ray."""
