"""What ONNX operators mean, a family per file: each gives a table of readers by operator."""
