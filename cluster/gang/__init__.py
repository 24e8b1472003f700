"""Seats, epochs, the control mesh and the lockstep loops of a gang. Knows no Ray."""
