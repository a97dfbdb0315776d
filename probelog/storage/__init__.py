"""Bytes, tables and records in a store: a directory or an object-store prefix."""
