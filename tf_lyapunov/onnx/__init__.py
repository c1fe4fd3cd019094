"""Exchange with other tools by ONNX files: what a program computes, in standard operators."""
