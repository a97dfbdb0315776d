"""Classifiers from untrusted files: configuration as data, construction, preprocessing."""
