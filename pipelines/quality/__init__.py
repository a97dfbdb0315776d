"""The quality gate: compares a generation that was built and checked with the live one before it is published.

`pipelines.publish.checks` checks that a generation equals the data that it was made from; the gate checks that this
data is no worse than that of the live generation. Publishers call `pipelines.quality.gate`.
"""
