"""Text-image encoders: in torch for building an index, as ONNX for asking it."""
