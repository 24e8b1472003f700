"""Multi-token prediction: what drafts gain, what they cost those who have none, and what the layer costs unused."""
