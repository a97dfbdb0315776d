"""Which model was made from which, from the stored statistics of their weights alone (docs/method.md, section 11)."""
