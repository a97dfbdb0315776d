"""Attacks: each against the real thing, and each would succeed without its guard."""
