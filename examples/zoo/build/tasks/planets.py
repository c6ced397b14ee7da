"""Patches of the surface maps of 24 planets and moons, from Debian's Stellarium; the test patches lie further east."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..arrays import SIZE, Images, Ints, TaskArrays, without_test_images
from ..downloads import Sources

CLASSES = tuple(
    """
    mercury venus earth_cmap moon mars phobos vesta ceres jupiter io europa ganymede callisto saturn mimas enceladus
    tethys dione rhea iapetus hyperion triton pluto charon
    """.split()
)
WIDTH, HEIGHT = 1024, 512
PATCH = 64
# Nearer to the poles a cylindrical map is stretched.
POLAR_MARGIN = 110
TRAIN_STEP, TEST_STEP = 24, 32
# Shares of the map's width. Between them lies a gap that no patch shows whole.
TRAIN_ENDS, TEST_STARTS = 0.60, 0.64


def build(sources: Sources) -> TaskArrays:
    """Cuts overlapping patches out of the maps, test patches from other longitudes."""
    folder = sources.apt("stellarium-data") / "usr/share/stellarium/textures"
    train, test = [], []
    for name in CLASSES:
        with Image.open(folder / f"{name}.png") as file:
            surface = file.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        train.append(patches(surface, TRAIN_STEP, 0, int(WIDTH * TRAIN_ENDS) - 1))
        test.append(patches(surface, TEST_STEP, int(WIDTH * TEST_STARTS), WIDTH))
    # The oceans are flat blue.
    return without_test_images(
        TaskArrays(np.concatenate(train), _labels(train), np.concatenate(test), _labels(test), CLASSES)
    )


def patches(surface: Image.Image, step: int, west: int, east: int) -> Images:
    """Cuts squares between two longitudes, row by row. [N, 32, 32, 3] uint8."""
    return np.stack(
        [
            np.asarray(
                surface.crop((x, y, x + PATCH, y + PATCH)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            )
            for y in range(POLAR_MARGIN, HEIGHT - POLAR_MARGIN - PATCH + 1, step)
            for x in range(west, east - PATCH + 1, step)
        ]
    )


def _labels(parts: list[Images]) -> Ints:
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int64)
