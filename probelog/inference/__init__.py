"""Forward passes of a classifier over probe images."""
