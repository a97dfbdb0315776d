"""Completion of partly observed matrices by alternating least squares, and what describes a completed row."""
