"""Pictures of the pretraining corpus: their words, their size, and what is cut from larger ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .corpus_rules import CONCEPT_WORDS, STOP_WORDS

SIZE = 40

Picture = NDArray[np.uint8]


class Item(NamedTuple):
    """One picture: the group it is drawn from, its RGBA pixels [SIZE, SIZE, 4] and its words."""

    group: str
    pixels: Picture
    words: tuple[str, ...]


def words_from_name(name: str) -> tuple[str, ...]:
    """Splits a file or icon name into words: no numbers, style words or concepts of the icons task.

    A name of two or three words is also a word of its own (`arrow-down` means more than its parts).
    """
    tokens = [token for token in re.split(r"[^a-z]+", name.lower()) if len(token) > 1]
    tokens = [token for token in tokens if token not in STOP_WORDS and token not in CONCEPT_WORDS]
    tokens = list(dict.fromkeys(tokens))
    joined = ["-".join(tokens)] if 2 <= len(tokens) <= 3 else []
    return tuple(tokens + joined)


def squared(image: Image.Image) -> Picture:
    """Fits a picture into a transparent square. [SIZE, SIZE, 4] uint8."""
    image = image.convert("RGBA")
    if max(image.size) > SIZE:
        scale = SIZE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        # Premultiplied, so that the colour under transparent pixels does not bleed into the edges.
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(canvas).copy()


def trimmed(image: Image.Image) -> Image.Image:
    """Without its transparent margins."""
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    return image.crop(box) if box else image


def crops(image: Image.Image, count: int, smallest: int, rng: np.random.Generator) -> Iterator[Picture]:
    """Random opaque squares of an image; flat ones are passed over."""
    image = image.convert("RGB")
    largest = min(image.size)
    for _ in range(count):
        side = int(np.exp(rng.uniform(np.log(min(smallest, largest)), np.log(largest))))
        left = int(rng.integers(image.width - side + 1))
        top = int(rng.integers(image.height - side + 1))
        crop = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        pixels = np.asarray(crop)
        if pixels.std(axis=(0, 1)).max() >= 5:
            yield np.dstack([pixels, np.full((SIZE, SIZE), 255, np.uint8)])


def pixel_count(path: Path) -> float:
    """Without decoding it; infinite for what is no sound image."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except (Image.DecompressionBombError, OSError):
        return math.inf
