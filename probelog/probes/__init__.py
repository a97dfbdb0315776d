"""The fixed set of probe images, and which of them a model sees."""
