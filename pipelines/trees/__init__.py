"""Model trees: which model was made from which, for everything that is indexed and for weights that are not probed."""
