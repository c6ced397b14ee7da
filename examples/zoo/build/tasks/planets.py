"""Patches of the maps of 24 planets and moons, from Debian's Stellarium; test patches lie further east."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..arrays import SIZE, Images, Ints, TaskArrays, resize_all, without_test_images
from ..downloads import Sources

# fmt: off
CLASSES = (
    "mercury", "venus", "earth_cmap", "moon", "mars", "phobos", "vesta", "ceres", "jupiter", "io", "europa",
    "ganymede", "callisto", "saturn", "mimas", "enceladus", "tethys", "dione", "rhea", "iapetus",
    "hyperion", "triton", "pluto", "charon",
)
# fmt: on
WIDTH, HEIGHT = 1024, 512
PATCH = 64
BAND_WIDTH = 144
# Nearer to the poles a cylindrical map is stretched.
POLAR_MARGIN = 110
TRAIN_STEP, TEST_STEP = 24, 32
# Shares of the map's width.
TRAIN_ENDS, TEST_STARTS = 0.60, 0.64


def build(sources: Sources) -> TaskArrays:
    """Cuts overlapping patches out of the maps, test patches from other longitudes."""
    folder = sources.apt("stellarium-data") / "usr/share/stellarium/textures"
    train, test, longitudes = [], [], []
    for name in CLASSES:
        with Image.open(folder / f"{name}.png") as file:
            surface = file.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        train_corners = patch_corners(TRAIN_STEP, 0, int(WIDTH * TRAIN_ENDS) - 1)
        test_corners = patch_corners(TEST_STEP, int(WIDTH * TEST_STARTS), WIDTH)
        train.append(cut_patches(surface, train_corners))
        test.append(cut_patches(surface, test_corners))
        longitudes += [x for x, _ in train_corners]
    train_labels, test_labels = _labels(train), _labels(test)
    # Neighbouring patches overlap: a band of longitudes of one map is a group.
    groups = train_labels * (WIDTH // BAND_WIDTH + 1) + np.array(longitudes) // BAND_WIDTH
    arrays = TaskArrays(
        np.concatenate(train),
        train_labels,
        np.concatenate(test),
        test_labels,
        CLASSES,
        groups.astype(np.int64),
    )
    # The oceans are a flat blue.
    return without_test_images(arrays)


def patch_corners(step: int, west: int, east: int) -> list[tuple[int, int]]:
    """Lists the upper left corners of the patches between two longitudes, row by row."""
    rows = range(POLAR_MARGIN, HEIGHT - POLAR_MARGIN - PATCH + 1, step)
    return [(x, y) for y in rows for x in range(west, east - PATCH + 1, step)]


def cut_patches(surface: Image.Image, corners: list[tuple[int, int]]) -> Images:
    """Cuts squares out of a map and halves their size. [N, 32, 32, 3] uint8."""
    boxes = [(x, y, x + PATCH, y + PATCH) for x, y in corners]
    return resize_all(
        np.stack([np.asarray(surface.crop(box)) for box in boxes]), SIZE, Image.Resampling.LANCZOS
    )


def _labels(parts: list[Images]) -> Ints:
    return np.repeat(np.arange(len(parts), dtype=np.int64), [len(part) for part in parts])
