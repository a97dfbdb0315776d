"""Generators described by what they make, and ranked by it: pure numpy, arrays in and arrays out."""
