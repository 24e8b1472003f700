"""What surrounds every route: keys, request ids, the log line, the last error handler."""
