"""Playing cards by rank: the decks of Debian's gnome-cards-data; the test decks are in no train image."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..arrays import SIZE, Images, TaskArrays, opaque_share, resize_all, split_arrays, square, trim
from ..downloads import ClientFailedError, ClientMissingError, Sources

CLASSES = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
TEST_DECKS = ("bellot", "dondorf", "lattmann", "ornamental", "plastic", "tango")
# The same file under two names.
SKIPPED_DECKS = ("Атласные",)
SUITS, SHEET_ROWS = 4, 5
CARD_WIDTH = 64
CARD_SIZE = 48
TABLE_GREEN = (20, 90, 50)


def build(sources: Sources) -> TaskArrays:
    """Renders each deck's sheet and cuts its cards out."""
    folder = sources.apt("gnome-cards-data") / "usr/share/aisleriot/cards"
    images, labels, decks = [], [], []
    for path in sorted(folder.glob("*.svgz")):
        if path.stem in SKIPPED_DECKS:
            continue
        for rank, card in cut_cards(render_sheet(path)):
            images.append(card)
            labels.append(rank)
            decks.append(path.stem)
    names, deck_numbers = np.unique(decks, return_inverse=True)
    is_test = np.isin(names[deck_numbers], TEST_DECKS)
    small = resize_all(np.stack(images), SIZE, Image.Resampling.BICUBIC)
    return split_arrays(small, np.array(labels), is_test, CLASSES, deck_numbers)


def render_sheet(path: Path) -> Image.Image:
    """Renders a deck's sheet: 13 ranks in columns; four suits, then jokers and back, in rows."""
    client = shutil.which("rsvg-convert")
    if client is None:
        raise ClientMissingError("rsvg-convert", "apt-get install librsvg2-bin")
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder) / "sheet.png"
        command = [client, "--unlimited", "-w", str(len(CLASSES) * CARD_WIDTH), "-o", str(sheet), str(path)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            raise ClientFailedError(
                command, process.stdout + process.stderr, "Is the package unpacked whole?"
            )
        with Image.open(sheet) as image:
            return image.convert("RGBA")


def cut_cards(sheet: Image.Image) -> list[tuple[int, Images]]:
    """Cuts the cards of the four suits out, those that the deck has: (rank, [48, 48, 3] uint8)."""
    width, height = sheet.width / len(CLASSES), sheet.height / SHEET_ROWS
    cards = []
    for suit in range(SUITS):
        for rank in range(len(CLASSES)):
            box = (int(rank * width), int(suit * height), int((rank + 1) * width), int((suit + 1) * height))
            card = sheet.crop(box)
            if opaque_share(card, above=30) >= 0.3:
                cards.append((rank, square(trim(card), CARD_SIZE, background=TABLE_GREEN)))
    return cards
