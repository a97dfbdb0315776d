"""The demonstration: a small hub, indexed and asked."""
