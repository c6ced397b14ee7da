"""Sources of the pretraining corpus that are photographs, paintings and the pictures of games."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .corpus_rules import STELLARIUM_TASK_BODIES
from .pictures import Item, crops, pixel_count, squared, trimmed, words_from_name


def stellarium_items(root: Path) -> Iterator[Item]:
    """Squares of the surfaces of bodies, of nebulae and of landscapes."""
    rng = np.random.default_rng(0)
    skip = re.compile(
        rf"^({'|'.join(STELLARIUM_TASK_BODIES)})|^(earth|moon|halo|lune|neb|star|gear|cross|disk|fog)"
    )
    for path in sorted((root / "textures").glob("*.png")):
        image = Image.open(path)
        if skip.search(path.stem) or min(image.size) < 200:
            continue
        image = image.convert("RGB").resize((1024, 512), Image.Resampling.LANCZOS)
        for pixels in crops(image, 220, 50, rng):
            yield Item("textures", pixels, (f"body {path.stem.lower()}",))
    for path in sorted((root / "nebulae" / "default").glob("*.png")):
        image = Image.open(path).convert("RGB")
        kind = re.match(r"[a-zA-Z]+", path.stem)
        image.thumbnail((256, 256), Image.Resampling.LANCZOS)
        for pixels in crops(image, 4, 60, rng):
            yield Item("textures", pixels, ("deep-sky", f"sky {kind.group().lower() if kind else 'other'}"))
    for place in ("garching", "geneva", "grossmugl", "guereins", "hurricane", "ocean", "trees"):
        for path in sorted((root / "landscapes" / place).glob("*.png")):
            if re.search(r"fog|illum", path.stem):
                continue
            image = trimmed(Image.open(path))
            for pixels in crops(image, 60, 60, rng):
                yield Item("textures", pixels, (f"place {place}",))


def terrain_items(root: Path) -> Iterator[Item]:
    """Tiles of a game's map, and the opaque squares within them."""
    rng = np.random.default_rng(0)
    for path in sorted(root.rglob("*.png")):
        folder = path.relative_to(root).parts[0]
        if folder in ("masks", "symbols", "fog", "void", "light", "off-map"):
            continue
        image = Image.open(path).convert("RGBA")
        words = (f"terrain {folder}", f"terrain {re.split(r'[-0-9]', path.stem)[0]}")
        yield Item("game", squared(trimmed(image)), words)
        # The inner square of a hexagonal tile is opaque: a texture.
        inner = image.crop((14, 10, 58, 62)) if image.size == (72, 72) else None
        if inner is not None and np.asarray(inner)[..., 3].min() == 255:
            for pixels in crops(inner, 2, 24, rng):
                yield Item("textures", pixels, words)


def wesnoth_items(root: Path) -> Iterator[Item]:
    """Other pictures of that game, and squares of its portraits."""
    rng = np.random.default_rng(0)
    for folder in ("attacks", "items", "scenery", "portraits", "halo", "icons", "projectiles"):
        for path in sorted((root / folder).rglob("*.png")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            image = trimmed(Image.open(path))
            if min(image.size) < 8:
                continue
            words = dict.fromkeys(
                [folder, *words_from_name(parts[-1]), *(f"{folder} {part}" for part in parts[:-1])]
            )
            yield Item("game", squared(image), tuple(words))
            if folder == "portraits":
                # Painted faces and armour, near enough to a photograph.
                for pixels in crops(image, 8, 60, rng):
                    yield Item("textures", pixels, tuple(word for word in words if word.startswith(folder)))


def texture_items(pack: Path) -> Iterator[Item]:
    """Squares of the textures in a game's archive."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(pack) as archive:
        for name in sorted(archive.namelist()):
            if not name.lower().endswith((".jpg", ".tga", ".png")):
                continue
            try:
                image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            except (OSError, ValueError, SyntaxError):
                continue
            if min(image.size) < 48:
                continue
            image.thumbnail((256, 256), Image.Resampling.LANCZOS)
            folder, stem = Path(name).parts[-2], Path(name).stem
            words = (f"texture {folder}", *words_from_name(stem)[:2])
            for pixels in crops(image, 14, 40, rng):
                yield Item("textures", pixels, words)


def wallpaper_items(root: Path) -> Iterator[Item]:
    """Squares of one picture of each wallpaper."""
    rng = np.random.default_rng(0)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        # Some are vertical or 200 megapixels large; the file of about a megabyte is the usual screen's.
        pictures = [path for path in (folder / "contents" / "images").glob("*.*") if pixel_count(path) < 4e7]
        pictures.sort(key=lambda path: (path.stat().st_size, path.name))
        if not pictures:
            continue
        image = Image.open(pictures[0])
        image.draft("RGB", (1024, 1024))
        image = image.convert("RGB")
        image.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
        for pixels in crops(image, 120, 60, rng):
            yield Item("textures", pixels, (f"wallpaper {folder.name.lower()}",))


def crossfire_items(path: Path) -> Iterator[Item]:
    """Reads the client's picture file: `IMAGE <bytes> <name>`, a line, then a PNG."""
    data = path.read_bytes()
    position = 0
    while position < len(data):
        end = data.index(b"\n", position)
        _, size, name = data[position:end].decode("ascii").split(" ", 2)
        png, position = data[end + 1 : end + 1 + int(size)], end + 1 + int(size)
        parts = name.removeprefix("./arch/").split("/")
        if any(re.search(r"flag|card|alphabet|planet", part) for part in parts):
            continue
        image = trimmed(Image.open(io.BytesIO(png)))
        if min(image.size) < 8 or max(image.size) > 160:
            continue
        folders = [f"crossfire {part}" for part in parts[:-1]]
        own = words_from_name(parts[-1].split(".")[0].replace("_", "-"))[:3]
        yield Item("game", squared(image), tuple(dict.fromkeys([*folders, *own])))
