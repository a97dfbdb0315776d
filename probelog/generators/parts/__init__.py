"""The parts of a pipeline, each made from a reduced configuration: networks with their weights, the schedule of noise, the tokenizer."""
