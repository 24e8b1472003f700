"""The Ray actors of a gang: thin shells around `cluster.gang`."""
