"""The pretraining corpus: pictures with the words of their file names, none of them from a task's test images.

Nothing here can be a test image of a task, by construction:

* icons: no set of the icons task's test families, no emoji set, no flag or map set; an icon named like one of
  the task's concepts is left out of every set, and the concepts are no words of the vocabulary;
* glyphs: only scripts other than Latin, no digits, from font packages that the letters task does not use;
* clip art, stamps: folders with flags, playing cards, alphabets, smileys and planets are left out;
* stellarium: bodies of the planets task are left out, whole maps at a time;
* wesnoth: nothing under a `units` folder.

Pictures are rendered once to `SIZE` px with their alpha channel kept; augmentation chooses the background.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from .corpus_rules import (
    CONCEPT_WORDS,
    FONT_PACKAGES,
    ICON_LICENSES,
    SCRIPTS,
    STELLARIUM_TASK_BODIES,
    STOP_WORDS,
    STYLE_SUFFIX,
    is_test_icon_set,
)
from .downloads import Sources

SIZE = 40
MAX_PER_SET = 1300
MAX_PER_NAME = {"icons": 60, "logos": 60, "glyphs": 48}
MAX_STYLES = 2
MAX_FONTS_PER_PACKAGE = 8
MIN_IMAGES_PER_WORD = 50
GROUPS = ("icons", "logos", "clipart", "glyphs", "textures", "game")
"""Sources that are sampled with fixed shares of a batch, see `pretrain.GROUP_SHARES`."""

Picture = NDArray[np.uint8]


class Item(NamedTuple):
    """One picture: the group it is drawn from, its RGBA pixels [SIZE, SIZE, 4] and its words."""

    group: str
    pixels: Picture
    words: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Pictures with words.

    Attributes:
        images: RGBA, not premultiplied. [N, SIZE, SIZE, 4] uint8, memory-mapped
        groups: index into `GROUPS`. [N] int64
        word_starts: the words of image i are `words[word_starts[i]:word_starts[i + 1]]`. [N + 1] int64
        words: index into `vocabulary`. [sum of words] int64
        vocabulary: the words
    """

    images: NDArray[np.uint8]
    groups: NDArray[np.int64]
    word_starts: NDArray[np.int64]
    words: NDArray[np.int64]
    vocabulary: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Opens what `build_corpus` wrote; images stay on disk."""
        with np.load(folder / "labels.npz", allow_pickle=False) as file:
            return cls(
                images=np.load(folder / "images.npy", mmap_mode="r"),
                groups=file["groups"],
                word_starts=file["word_starts"],
                words=file["words"],
                vocabulary=tuple(str(word) for word in file["vocabulary"]),
            )


def build_corpus(sources: Sources, folder: Path, processes: int = 2) -> Corpus:
    """Renders the corpus into a folder, unless it is there already.

    Args:
        sources: the packages
        folder: gets `images.npy` and `labels.npz`
        processes: rendering processes

    Returns:
        the corpus
    """
    if (folder / "labels.npz").is_file():
        return Corpus.load(folder)
    for package in (*FONT_PACKAGES, *_PICTURE_PACKAGES):
        sources.apt(package)
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    jobs = [(job, parts / f"{number:03d}.npz") for number, job in enumerate(_jobs(sources))]
    with get_context("spawn").Pool(processes) as pool:
        for _ in track(pool.imap_unordered(_render_part, jobs), "Rendering the corpus", total=len(jobs)):
            pass
    items = [item for _, part in jobs for item in _read_part(part)]
    items = _without_crowds(items)
    vocabulary = _vocabulary(items)
    index = {word: position for position, word in enumerate(vocabulary)}
    kept = [(item, [index[word] for word in item.words if word in index]) for item in items]
    kept = [(item, words) for item, words in kept if words]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", np.stack([item.pixels for item, _ in kept]))
    np.savez_compressed(
        folder / "labels.npz",
        groups=np.array([GROUPS.index(item.group) for item, _ in kept]),
        word_starts=np.cumsum([0, *(len(words) for _, words in kept)]),
        words=np.concatenate([words for _, words in kept]),
        vocabulary=np.array(vocabulary),
    )
    return Corpus.load(folder)


def _without_crowds(items: list[Item]) -> list[Item]:
    """Keeps no picture twice, and at most `MAX_PER_NAME` with the same words: some names stand in every set."""
    seen: set[bytes] = set()
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    kept = []
    # A fixed shuffle, so that the sets late in the alphabet get their share.
    for position in np.random.default_rng(0).permutation(len(items)):
        item = items[position]
        key, digest = (item.group, item.words), hashlib.sha256(item.pixels.tobytes()).digest()
        if digest in seen or counts[key] >= MAX_PER_NAME.get(item.group, len(items)):
            continue
        seen.add(digest)
        counts[key] += 1
        kept.append(item)
    return kept


def _vocabulary(items: Iterable[Item]) -> list[str]:
    counts = Counter(word for item in items for word in set(item.words))
    return sorted(word for word, count in counts.items() if count >= MIN_IMAGES_PER_WORD)


def words_from_name(name: str) -> tuple[str, ...]:
    """Splits a file or icon name into words: no numbers, style words or concepts of the icons task.

    A name of two or three words is also a word of its own (`arrow-down` means more than its parts).
    """
    tokens = [token for token in re.split(r"[^a-z]+", name.lower()) if len(token) > 1]
    tokens = [token for token in tokens if token not in STOP_WORDS and token not in CONCEPT_WORDS]
    tokens = list(dict.fromkeys(tokens))
    joined = ["-".join(tokens)] if 2 <= len(tokens) <= 3 else []
    return tuple(tokens + joined)


# --- jobs: each renders one part, in a process of its own ---


class _Job(NamedTuple):
    render: Callable[..., Iterator[Item]]
    arguments: tuple[object, ...]


def _render_part(job_and_file: tuple[_Job, Path]) -> None:
    """Renders one part into its file, unless it is there."""
    job, file = job_and_file
    if file.is_file():
        return
    items = list(job.render(*job.arguments))
    partial = file.with_suffix(".partial.npz")
    np.savez(
        partial,
        pixels=np.stack([item.pixels for item in items]) if items else np.zeros((0, SIZE, SIZE, 4), np.uint8),
        labels=np.array(json.dumps([(item.group, item.words) for item in items])),
    )
    partial.replace(file)


def _read_part(file: Path) -> Iterator[Item]:
    with np.load(file, allow_pickle=False) as part:
        labels = json.loads(str(part["labels"]))
        for pixels, (group, words) in zip(part["pixels"], labels, strict=True):
            yield Item(group, pixels, tuple(words))


_PICTURE_PACKAGES = (
    "openclipart-png",
    "tuxpaint-stamps-default",
    "stellarium-data",
    "wesnoth-1.16-data",
    "openarena-081-textures",
    "plasma-workspace-wallpapers",
    "crossfire-client-images",
)


def _jobs(sources: Sources) -> Iterator[_Job]:
    for package in FONT_PACKAGES:
        yield _Job(_glyph_items, (sources.apt(package),))
    share = {package: sources.apt(package) / "usr" / "share" for package in _PICTURE_PACKAGES}
    clipart = share["openclipart-png"] / "openclipart" / "png"
    for part in sorted(path for path in clipart.iterdir() if path.is_dir()):
        yield _Job(_clipart_items, (clipart, part))
    stamps = share["tuxpaint-stamps-default"] / "tuxpaint" / "stamps"
    yield _Job(_clipart_items, (stamps, stamps))
    yield _Job(_stellarium_items, (share["stellarium-data"] / "stellarium",))
    wesnoth = share["wesnoth-1.16-data"] / "games" / "wesnoth" / "1.16" / "data" / "core" / "images"
    yield _Job(_terrain_items, (wesnoth / "terrain",))
    yield _Job(_wesnoth_items, (wesnoth,))
    pack = share["openarena-081-textures"] / "games" / "openarena" / "baseoa" / "pak4-textures.pk3"
    yield _Job(_texture_items, (pack,))
    yield _Job(_wallpaper_items, (share["plasma-workspace-wallpapers"] / "wallpapers",))
    crossfire = share["crossfire-client-images"] / "games" / "crossfire-client" / "crossfire.base"
    yield _Job(_crossfire_items, (crossfire,))
    iconify = sources.npm("@iconify/json")
    collections = json.loads((iconify / "collections.json").read_text(encoding="utf-8"))
    for prefix, info in sorted(collections.items(), key=lambda pair: -pair[1]["total"]):
        if not is_test_icon_set(prefix, info) and info["license"].get("spdx") in ICON_LICENSES:
            group = "logos" if info.get("category") in ("Logos", "Programming") else "icons"
            yield _Job(_icon_items, (iconify / "json" / f"{prefix}.json", group))


def _icon_items(path: Path, group: str) -> Iterator[Item]:
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
    return _squared(Image.open(io.BytesIO(bytes(png))))


def _squared(image: Image.Image) -> Picture:
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


def _trimmed(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    return image.crop(box) if box else image


def _font_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc"))


def _glyph_items(package: Path) -> Iterator[Item]:
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


def _clipart_items(root: Path, part: Path) -> Iterator[Item]:
    for path in sorted(part.rglob("*.png")):
        relative = path.relative_to(root).with_suffix("").as_posix()
        # A few are drawn 10,000 pixels wide and would take longer than all others together.
        if _NOT_CLIPART.search(relative) or _pixel_count(path) > 6e6:
            continue
        try:
            image = _trimmed(Image.open(path))
        except (OSError, ValueError, SyntaxError):
            continue
        if min(image.size) < 8:
            continue
        folders = [word for folder in relative.split("/")[:-1] for word in words_from_name(folder)[:2]]
        words = dict.fromkeys([*words_from_name(relative.split("/")[-1]), *folders])
        yield Item("clipart", _squared(image), tuple(words))


def _crops(image: Image.Image, count: int, smallest: int, rng: np.random.Generator) -> Iterator[Picture]:
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


def _stellarium_items(root: Path) -> Iterator[Item]:
    rng = np.random.default_rng(0)
    skip = re.compile(
        rf"^({'|'.join(STELLARIUM_TASK_BODIES)})|^(earth|moon|halo|lune|neb|star|gear|cross|disk|fog)"
    )
    for path in sorted((root / "textures").glob("*.png")):
        image = Image.open(path)
        if skip.search(path.stem) or min(image.size) < 200:
            continue
        image = image.convert("RGB").resize((1024, 512), Image.Resampling.LANCZOS)
        for pixels in _crops(image, 220, 50, rng):
            yield Item("textures", pixels, (f"body {path.stem.lower()}",))
    for path in sorted((root / "nebulae" / "default").glob("*.png")):
        image = Image.open(path).convert("RGB")
        kind = re.match(r"[a-zA-Z]+", path.stem)
        image.thumbnail((256, 256), Image.Resampling.LANCZOS)
        for pixels in _crops(image, 4, 60, rng):
            yield Item("textures", pixels, ("deep-sky", f"sky {kind.group().lower() if kind else 'other'}"))
    for place in ("garching", "geneva", "grossmugl", "guereins", "hurricane", "ocean", "trees"):
        for path in sorted((root / "landscapes" / place).glob("*.png")):
            if re.search(r"fog|illum", path.stem):
                continue
            image = _trimmed(Image.open(path))
            for pixels in _crops(image, 60, 60, rng):
                yield Item("textures", pixels, (f"place {place}",))


def _terrain_items(root: Path) -> Iterator[Item]:
    rng = np.random.default_rng(0)
    for path in sorted(root.rglob("*.png")):
        folder = path.relative_to(root).parts[0]
        if folder in ("masks", "symbols", "fog", "void", "light", "off-map"):
            continue
        image = Image.open(path).convert("RGBA")
        words = (f"terrain {folder}", f"terrain {re.split(r'[-0-9]', path.stem)[0]}")
        yield Item("game", _squared(_trimmed(image)), words)
        # The inner square of a hexagonal tile is opaque: a texture.
        inner = image.crop((14, 10, 58, 62)) if image.size == (72, 72) else None
        if inner is not None and np.asarray(inner)[..., 3].min() == 255:
            for pixels in _crops(inner, 2, 24, rng):
                yield Item("textures", pixels, words)


def _wesnoth_items(root: Path) -> Iterator[Item]:
    rng = np.random.default_rng(0)
    for folder in ("attacks", "items", "scenery", "portraits", "halo", "icons", "projectiles"):
        for path in sorted((root / folder).rglob("*.png")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            image = _trimmed(Image.open(path))
            if min(image.size) < 8:
                continue
            words = dict.fromkeys(
                [folder, *words_from_name(parts[-1]), *(f"{folder} {part}" for part in parts[:-1])]
            )
            yield Item("game", _squared(image), tuple(words))
            if folder == "portraits":
                # Painted faces and armour, near enough to a photograph.
                for pixels in _crops(image, 8, 60, rng):
                    yield Item("textures", pixels, tuple(word for word in words if word.startswith(folder)))


def _texture_items(pack: Path) -> Iterator[Item]:
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
            for pixels in _crops(image, 14, 40, rng):
                yield Item("textures", pixels, words)


def _wallpaper_items(root: Path) -> Iterator[Item]:
    rng = np.random.default_rng(0)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        # Some are vertical or 200 megapixels large; the file of about a megabyte is the usual screen's.
        pictures = [path for path in (folder / "contents" / "images").glob("*.*") if _pixel_count(path) < 4e7]
        pictures.sort(key=lambda path: (path.stat().st_size, path.name))
        if not pictures:
            continue
        image = Image.open(pictures[0])
        image.draft("RGB", (1024, 1024))
        image = image.convert("RGB")
        image.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
        for pixels in _crops(image, 120, 60, rng):
            yield Item("textures", pixels, (f"wallpaper {folder.name.lower()}",))


def _pixel_count(path: Path) -> float:
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except (Image.DecompressionBombError, OSError):
        return math.inf


def _crossfire_items(path: Path) -> Iterator[Item]:
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
        image = _trimmed(Image.open(io.BytesIO(png)))
        if min(image.size) < 8 or max(image.size) > 160:
            continue
        folders = [f"crossfire {part}" for part in parts[:-1]]
        own = words_from_name(parts[-1].split(".")[0].replace("_", "-"))[:3]
        yield Item("game", _squared(image), tuple(dict.fromkeys([*folders, *own])))
