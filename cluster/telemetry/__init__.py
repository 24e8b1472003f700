"""What a process tells of itself: metrics, spans of requests and steps. Imports neither torch nor Ray."""
