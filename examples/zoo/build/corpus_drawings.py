"""Sources of the pretraining corpus that are drawn: icons, glyphs, clip art."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .corpus_rules import CONCEPT_WORDS, SCRIPTS, STYLE_SUFFIX
from .pictures import SIZE, Item, Picture, pixel_count, squared, trimmed, words_from_name

MAX_PER_SET = 1300
MAX_STYLES = 2
MAX_FONTS_PER_PACKAGE = 8


def icon_items(path: Path, group: str) -> Iterator[Item]:
    """Of one icon set, at most `MAX_PER_SET`, evenly over the alphabet."""
    import resvg_py  # noqa: PLC0415 - only the rendering processes need it

    icon_set = json.loads(path.read_text(encoding="utf-8"))
    styles: Counter[str] = Counter()
    names = sorted(icon_set["icons"])
    # An even choice over the alphabet when the set is larger than its share.
    order = np.random.default_rng(0).permutation(len(names))
    count = 0
    for name in (names[position] for position in order):
        icon = icon_set["icons"][name]
        if icon.get("hidden") or "animate" in icon["body"] or len(icon["body"]) > 20000:
            continue
        plain = name
        for _ in range(3):
            plain = STYLE_SUFFIX.sub("", plain)
        words = words_from_name(plain)
        if plain in CONCEPT_WORDS or "flag" in plain or not words or styles[plain] >= MAX_STYLES:
            continue
        try:
            pixels = _icon_pixels(resvg_py, icon_set, icon)
        except (ValueError, RuntimeError, OSError):
            continue  # a few icons use SVG features the renderer refuses
        if (pixels[..., 3] > 40).mean() < 0.01:
            continue
        styles[plain] += 1
        count += 1
        yield Item(group, pixels, words)
        if count >= MAX_PER_SET:
            return


def _icon_pixels(resvg_py: object, icon_set: dict[str, object], icon: dict[str, object]) -> Picture:
    width, height = (icon.get(key, icon_set.get(key, 16)) for key in ("width", "height"))
    if min(width, height) <= 0:
        raise ValueError("an icon without size")
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}" color="#000">'
        f"{icon['body']}</svg>"
    )
    scale = SIZE / max(width, height)
    size = {"width": max(1, round(width * scale)), "height": max(1, round(height * scale))}
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **size)
    return squared(Image.open(io.BytesIO(bytes(png))))


def _font_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc"))


def glyph_items(package: Path) -> Iterator[Item]:
    """Characters of other scripts, as masks, from a package's fonts."""
    from fontTools.ttLib import TTCollection, TTFont  # noqa: PLC0415 - only the rendering processes need it

    fonts = _font_files(package)
    used: Counter[str] = Counter()
    for position in np.random.default_rng(0).permutation(len(fonts)):
        path = fonts[position]
        try:
            collection = path.suffix.lower() == ".ttc"
            font = TTCollection(path, lazy=True).fonts[0] if collection else TTFont(path, lazy=True)
            covered = set(font.getBestCmap() or {})
            drawer = ImageFont.truetype(str(path), 44)
        except Exception:  # noqa: BLE001, S112 - broken fonts raise anything; there are enough others
            continue
        for script, characters in SCRIPTS:
            drawable = [char for char in characters if ord(char) in covered]
            if used[script] >= MAX_FONTS_PER_PACKAGE or len(drawable) < 0.6 * len(characters):
                continue
            used[script] += 1
            for char in drawable:
                mask = _glyph_mask(drawer, char)
                if mask is not None:
                    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
                    pixels[..., 3] = mask
                    yield Item("glyphs", pixels, (f"{script} {char}", script))


def _glyph_mask(drawer: ImageFont.FreeTypeFont, char: str) -> Picture | None:
    try:
        left, top, right, bottom = drawer.getbbox(char)
    except OSError:
        return None
    if right - left < 3 or bottom - top < 3:
        return None
    width, height = int(right - left) + 8, int(bottom - top) + 8
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((4 - left, 4 - top), char, fill=255, font=drawer)
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    side = math.ceil(max(image.size) * 1.12)
    canvas = Image.new("L", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


_NOT_CLIPART = re.compile(
    r"flag|card|alphabet|smil|emoji|emoticon|face|planet|moon|astronomy|led|duplicates|dice"
)


def clipart_items(root: Path, part: Path) -> Iterator[Item]:
    """Clip art of one folder below the root; folders give words, too."""
    for path in sorted(part.rglob("*.png")):
        relative = path.relative_to(root).with_suffix("").as_posix()
        # A few are drawn 10,000 pixels wide and would take longer than all others together.
        if _NOT_CLIPART.search(relative) or pixel_count(path) > 6e6:
            continue
        try:
            image = trimmed(Image.open(path))
        except (OSError, ValueError, SyntaxError):
            continue
        if min(image.size) < 8:
            continue
        folders = [word for folder in relative.split("/")[:-1] for word in words_from_name(folder)[:2]]
        words = dict.fromkeys([*words_from_name(relative.split("/")[-1]), *folders])
        yield Item("clipart", squared(image), tuple(words))
