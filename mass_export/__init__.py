"""Build MASS artifacts and bundles from fine-tuned CLIP vision towers."""

__version__ = "0.1.0"
