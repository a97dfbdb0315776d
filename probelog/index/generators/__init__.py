"""Generators in an index: the schemas of their tables, the encoding of their descriptions, and their reading."""
