"""Queries for generators: those that make a concept, and what a generator says about itself."""
