"""Build MASS artifacts and bundles from fine-tuned CLIP vision towers."""
