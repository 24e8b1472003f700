"""Which virtual shards each expert seat serves and holds, who is in an epoch for that, and when it becomes another."""
