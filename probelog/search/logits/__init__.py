"""Logits as answers."""
