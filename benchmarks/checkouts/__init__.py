"""Two checkouts of Divisi beside each other on one machine: the same tokens, and how fast."""
