"""The query client: queries, ranking and results."""
