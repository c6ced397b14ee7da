"""Merge fine-tuned CLIP vision models into one multitask classifier (MASS) and export it to ONNX and TensorRT."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mass-export")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
