"""Writing generations of an index: rows, updates, and the step that makes one live."""
