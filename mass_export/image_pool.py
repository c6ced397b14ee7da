"""Images without labels, for calibration: a folder (searched recursively), an image, or an array file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mass_export.datasets import IMAGE_SUFFIXES, LabelledImages, read_arrays
from mass_export.errors import DataError
from runtime.bundle import PreprocessSpec
from runtime.preprocess import ImageSource


def load_pool(place: Path, spec: PreprocessSpec, limit: int | None = None) -> NDArray[np.float32]:
    """Preprocessed images of a folder or of an `.npz` file with an array `images` (uint8 [N, H, W(, 3)]).

    Args:
        place: folder, image file or array file; labels in it are not read.
        spec: preprocessing.
        limit: at most so many, drawn at random with a fixed seed.

    Returns:
        [n, 3, H, W] float32

    Raises:
        DataError: there are no images, or one cannot be read.
    """
    sources: list[ImageSource] = [*_array(place)] if place.suffix == ".npz" else [*image_files(place)]
    if not sources:
        raise DataError(f"{place}: its array 'images' is empty.")
    images = LabelledImages(place, sources, np.zeros(len(sources), np.int64))
    return (images if limit is None else images.sample(limit)).pixel_values(spec)


def image_files(place: Path) -> list[Path]:
    """An image file itself, or all of a folder, searched recursively, sorted.

    Raises:
        DataError: there are none.
    """
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    else:
        files = [place] if place.is_file() else []
    if not files:
        fault = "no images in this folder" if place.is_dir() else "no such file or folder"
        raise DataError(
            f"{place}: {fault}; give images ({', '.join(sorted(IMAGE_SUFFIXES))}) or a folder of them."
        )
    return files


def _array(file: Path) -> NDArray[np.uint8]:
    (images,) = read_arrays(file, "images")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{file}: images: expected uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} {images.shape}."
        )
    return images
