"""Probing spread over workers."""
