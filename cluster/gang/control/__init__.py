"""The control mesh of an epoch: headers, agreement on steps, beats. Sockets of its own, no Ray."""
