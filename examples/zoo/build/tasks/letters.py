"""Capital letters of free fonts from Debian; the test fonts belong to families that no train font is of."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..arrays import (
    SIZE,
    Images,
    Ints,
    TaskArrays,
    cluster,
    draw_groups,
    pixel_directions,
    sampled,
    split_arrays,
    without_test_images,
)
from ..downloads import Sources

SEED = 0
CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# fmt: off
FONT_PACKAGES = (
    "3270", "adf-baskervald", "adf-gillius", "adf-irianis", "adf-mekanus", "adf-oldania", "adf-romande",
    "adf-solothurn", "adf-verana", "aenigma", "allerta", "apropal", "arapey", "atarismall", "averia-gwf",
    "averia-sans-gwf", "averia-serif-gwf", "b612", "bajaderka", "bebas-neue", "beteckna", "blankenburg",
    "breip", "bwht", "cabinsketch", "campania", "cantarell", "cardo", "century-catalogue", "comfortaa",
    "comic-neue", "courier-prime", "dancingscript", "dejavu-core", "dkg-handwriting", "dosis", "dustin",
    "ebgaramond", "ecolier-court", "engadget", "essays1743", "eurofurence", "f500", "fantasma",
    "fantasque-sans", "fanwood", "femkeklaver", "georgewilliams", "gnutypewriter", "gotico-antiqua",
    "goudybookletter", "havana", "humor-sans", "inconsolata", "isabella", "joscelyn", "jura", "karla",
    "kaushanscript", "klaudia-berenika", "kristi", "le-murmure", "league-spartan", "leckerli-one",
    "levien-museum", "liberation2", "lindenhill", "linuxlibertine", "lobster",
    "lobstertwo", "monofur", "national-park", "ocr-a", "ocr-b", "okolaks", "oldstandard", "opendin",
    "opendyslexic", "play", "prociono", "radisnoir", "routed-gothic", "rufscript", "sixtyfour", "sjfonts",
    "staypuft", "summersby", "tomsontalks", "tuffy", "yanone-kaffeesatz",
)
# fmt: on
SLANTED = re.compile(r"[Ii]talic|[Oo]blique")
STYLE_SUFFIX = re.compile(
    r"[-_ ]?(bold|italic|oblique|regular|medium|light|heavy|black|semibold|demi|book|roman|it|bd|rg|r|b|i|bi"
    r"|extra|thin|ultra|\d+)+$",
    re.IGNORECASE,
)
SAME_DESIGN = 0.93
FONTS_PER_FAMILY = 12
TEST_SHARE = 0.2
TRAIN_SIZE, TEST_SIZE = 12_000, 2_000


def build(sources: Sources) -> TaskArrays:
    """Renders the fonts, groups them by family and design, and splits by group."""
    rng = np.random.default_rng(SEED)
    glyphs, families = render_fonts(sources)
    designs = cluster(len(glyphs), relatives(glyphs, families))
    kept = distinct_fonts(glyphs, designs, rng)
    glyphs, designs = glyphs[kept], designs[kept]
    names, sizes = np.unique(designs, return_counts=True)
    small = sizes <= max(3, 0.1 * len(glyphs))
    test_designs = draw_groups(names, sizes, rng, TEST_SHARE * len(glyphs), eligible=small)
    is_test = np.repeat(np.isin(designs, test_designs), len(CLASSES))
    images = glyphs.reshape(-1, SIZE, SIZE)
    labels = np.tile(np.arange(len(CLASSES)), len(glyphs))
    arrays = split_arrays(images, labels, is_test, CLASSES, np.repeat(designs, len(CLASSES)))
    # Some fonts share a plain letter, such as the bar of an I.
    return without_test_images(sampled(arrays, "letters", TRAIN_SIZE, TEST_SIZE))


def render_fonts(sources: Sources) -> tuple[Images, list[tuple[str, str]]]:
    """Renders the upright fonts that have all letters: [F, 26, 32, 32], and (package, family) of each."""
    glyphs, families = [], []
    for name in FONT_PACKAGES:
        root = sources.apt(f"fonts-{name}")
        for path in sorted(root.rglob("*"), key=str):
            if path.suffix.lower() not in {".ttf", ".otf", ".ttc"} or SLANTED.search(
                str(path.relative_to(root))
            ):
                continue
            for index in complete_faces(path):
                face = render_face(path, index)
                if face is not None:
                    glyphs.append(face)
                    families.append((name, family_name(path)))
    return np.stack(glyphs), families


def complete_faces(path: Path) -> Iterator[int]:
    """Yields the indices of a font file's faces that have every letter."""
    from fontTools.ttLib import TTCollection, TTFont, TTLibError  # noqa: PLC0415 - only rebuilding the zoo needs it

    logging.getLogger("fontTools").setLevel(logging.CRITICAL)
    with contextlib.suppress(TTLibError, OSError, ValueError):
        faces = (
            TTCollection(path, lazy=True).fonts
            if path.suffix.lower() == ".ttc"
            else [TTFont(path, lazy=True)]
        )
        for index, face in enumerate(faces):
            characters = face.getBestCmap() or {}
            if all(ord(letter) in characters for letter in CLASSES):
                yield index


def render_face(path: Path, index: int) -> Images | None:
    """Renders one face's letters; None if letters are empty or too many look the same. [26, 32, 32] uint8."""
    try:
        font = ImageFont.truetype(path, 64, index=index)
        glyphs = [render_glyph(font, letter) for letter in CLASSES]
    except (OSError, ValueError):
        return None
    drawn = [glyph for glyph in glyphs if glyph is not None]
    if len(drawn) < len(CLASSES) or len({glyph.tobytes() for glyph in drawn}) < 0.9 * len(CLASSES):
        return None
    return np.stack(drawn)


def render_glyph(font: ImageFont.FreeTypeFont, letter: str) -> Images | None:
    """Draws a letter white on black, trimmed and centred in a square; None if nothing is visible."""
    left, top, right, bottom = font.getbbox(letter)
    if right - left < 2 or bottom - top < 2:
        return None
    image = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8), 0)
    ImageDraw.Draw(image).text((4 - left, 4 - top), letter, fill=255, font=font)
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    side = int(max(image.size) * 1.18)
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def family_name(path: Path) -> str:
    """Returns a font file's name without its style (`Karla-Bold.ttf` -> `karla`), at most 10 letters."""
    return STYLE_SUFFIX.sub("", path.stem).lower()[:10]


def relatives(glyphs: Images, families: list[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """Yields pairs of fonts of one family, and of fonts whose letters correlate highly."""
    count, letters = glyphs.shape[:2]
    directions = pixel_directions(glyphs.reshape(count * letters, -1)).reshape(count, -1) / np.sqrt(
        np.float32(letters)
    )
    similarity = directions @ directions.T
    for i in range(count):
        for j in range(i):
            if similarity[i, j] > SAME_DESIGN or families[i] == families[j]:
                yield i, j


def distinct_fonts(glyphs: Images, designs: Ints, rng: np.random.Generator) -> Ints:
    """Draws at most 12 fonts of each design, all different in their pixels. Ascending, int64."""
    seen: set[bytes] = set()
    kept: list[int] = []
    for design in np.unique(designs):
        members = []
        for font in np.flatnonzero(designs == design):
            pixels = glyphs[font].tobytes()
            if pixels not in seen:
                seen.add(pixels)
                members.append(font)
        kept += rng.permutation(members)[:FONTS_PER_FAMILY].tolist()
    return np.array(sorted(kept), dtype=np.int64)
