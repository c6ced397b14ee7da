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
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from .corpus_drawings import clipart_items, glyph_items, icon_items
from .corpus_rules import (
    FONT_PACKAGES,
    ICON_LICENSES,
    is_test_icon_set,
)
from .corpus_scenes import (
    crossfire_items,
    stellarium_items,
    terrain_items,
    texture_items,
    wallpaper_items,
    wesnoth_items,
)
from .downloads import Sources
from .pictures import SIZE, Item

MAX_PER_NAME = {"icons": 60, "logos": 60, "glyphs": 48}
MIN_IMAGES_PER_WORD = 50
GROUPS = ("icons", "logos", "clipart", "glyphs", "textures", "game")
"""Sources that are sampled with fixed shares of a batch, see `pretrain.GROUP_SHARES`."""


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
        yield _Job(glyph_items, (sources.apt(package),))
    share = {package: sources.apt(package) / "usr" / "share" for package in _PICTURE_PACKAGES}
    clipart = share["openclipart-png"] / "openclipart" / "png"
    for part in sorted(path for path in clipart.iterdir() if path.is_dir()):
        yield _Job(clipart_items, (clipart, part))
    stamps = share["tuxpaint-stamps-default"] / "tuxpaint" / "stamps"
    yield _Job(clipart_items, (stamps, stamps))
    yield _Job(stellarium_items, (share["stellarium-data"] / "stellarium",))
    wesnoth = share["wesnoth-1.16-data"] / "games" / "wesnoth" / "1.16" / "data" / "core" / "images"
    yield _Job(terrain_items, (wesnoth / "terrain",))
    yield _Job(wesnoth_items, (wesnoth,))
    pack = share["openarena-081-textures"] / "games" / "openarena" / "baseoa" / "pak4-textures.pk3"
    yield _Job(texture_items, (pack,))
    yield _Job(wallpaper_items, (share["plasma-workspace-wallpapers"] / "wallpapers",))
    crossfire = share["crossfire-client-images"] / "games" / "crossfire-client" / "crossfire.base"
    yield _Job(crossfire_items, (crossfire,))
    iconify = sources.npm("@iconify/json")
    collections = json.loads((iconify / "collections.json").read_text(encoding="utf-8"))
    for prefix, info in sorted(collections.items(), key=lambda pair: -pair[1]["total"]):
        if not is_test_icon_set(prefix, info) and info["license"].get("spdx") in ICON_LICENSES:
            group = "logos" if info.get("category") in ("Logos", "Programming") else "icons"
            yield _Job(icon_items, (iconify / "json" / f"{prefix}.json", group))
