"""Processes in which untrusted models run, confined."""
