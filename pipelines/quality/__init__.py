"""The quality gate: whether a generation that was built and checked is fit to be read.

`pipelines.publish.checks` asks whether a generation is what it was made of; the gate asks whether what it was made of
is any good, beside what readers have now. `pipelines.quality.gate` is what publishers call.
"""
