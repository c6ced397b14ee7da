"""Clothes: Fashion-MNIST from Debian, a sample of its official split."""

from __future__ import annotations

import gzip

from ..arrays import TaskArrays, sampled
from ..downloads import Sources
from .mnist import TEST_SIZE, TRAIN_SIZE, read_official_split

CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


def build(sources: Sources) -> TaskArrays:
    """Reads Fashion-MNIST and samples it."""
    folder = sources.apt("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    parts = [
        (
            gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()),
            gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()),
        )
        for part in ("train", "t10k")
    ]
    return sampled(read_official_split(parts, CLASSES), "fashion", TRAIN_SIZE, TEST_SIZE)
