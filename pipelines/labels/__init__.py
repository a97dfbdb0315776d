"""Declared labels: when two of them mean the same, and what they say about confidence."""
