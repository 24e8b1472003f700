"""Replies and events as models, for the OpenAPI document and for tests."""
