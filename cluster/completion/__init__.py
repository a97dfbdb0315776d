"""Completion spread over shards."""
