"""Kinds of models: what differs between a classifier and a generator on the way from the Hub to the index."""
