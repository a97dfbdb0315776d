"""How well a logit matches a query: matched heads, calibration by a background, confidence."""
