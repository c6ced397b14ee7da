"""Run mass-export bundles: numpy, Pillow and ONNX Runtime, no torch."""
