"""Completing what was observed."""
