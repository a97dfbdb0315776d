"""Builds the demonstration's hub."""
