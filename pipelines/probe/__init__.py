"""Running every model on its probes."""
