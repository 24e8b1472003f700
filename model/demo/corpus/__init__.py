"""Conversations to train and evaluate on, generated from a seed; words and phrasings never cross splits."""
