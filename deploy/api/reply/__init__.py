"""From token events to the reply: text, deltas, one JSON body or server-sent events."""
