"""What a recipe makes (`TaskArrays`), and what recipes share: squaring images, near-duplicates, splitting.

The order of every loop and draw here is part of the recipes: the committed test images were drawn by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 32
WHITE = (255, 255, 255)
_ROWS_AT_ONCE = 500
# Parts larger than needed were sampled, one after the other from one stream: task, size of the part.
_SAMPLED_PARTS = (
    ("mnist", 60_000),
    ("mnist", 10_000),
    ("fashion", 60_000),
    ("fashion", 10_000),
    ("letters", 15_600),
    ("letters", 3_874),
    ("emoji", 2_560),
    ("sprites", 1_369),
)

Images = NDArray[np.uint8]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TaskArrays:
    """One task's images, split so that test images come from other sources than the train images.

    Attributes:
        train_images: [N, 32, 32] grey or [N, 32, 32, 3] RGB, uint8
        train_labels: index into `classes`. [N] int64
        test_images: as train_images. [M, 32, 32(, 3)] uint8
        test_labels: index into `classes`. [M] int64
        classes: names, in label order
        train_groups: images of one group are alike (one font, one animal, one drawing) and should stay
            together when a validation set is split off; None where images are independent. [N] int64
    """

    train_images: Images
    train_labels: Ints
    test_images: Images
    test_labels: Ints
    classes: tuple[str, ...]
    train_groups: Ints | None = None

    def save(self, path: Path) -> None:
        """Writes a compressed npz without pickles."""
        arrays: dict[str, NDArray[Any]] = {
            "train_images": self.train_images,
            "train_labels": self.train_labels,
            "test_images": self.test_images,
            "test_labels": self.test_labels,
            "classes": np.array(self.classes),
        }
        if self.train_groups is not None:
            arrays["train_groups"] = self.train_groups
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> TaskArrays:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(
                train_images=file["train_images"],
                train_labels=file["train_labels"],
                test_images=file["test_images"],
                test_labels=file["test_labels"],
                classes=tuple(str(name) for name in file["classes"]),
                train_groups=file["train_groups"] if "train_groups" in file.files else None,
            )


def split_arrays(
    images: Images, labels: Ints, is_test: Bools, classes: Sequence[str], groups: Ints | None = None
) -> TaskArrays:
    """Splits images by a mask; the order within each part is kept."""
    return TaskArrays(
        train_images=images[~is_test],
        train_labels=labels[~is_test].astype(np.int64),
        test_images=images[is_test],
        test_labels=labels[is_test].astype(np.int64),
        classes=tuple(classes),
        train_groups=None if groups is None else groups[~is_test].astype(np.int64),
    )


def trim(image: Image.Image) -> Image.Image:
    """Cuts the (nearly) transparent margin off; an image without any opaque pixel stays as it is."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 9 + [255] * 247).getbbox()
    return image.crop(box) if box else image


def square(
    image: Image.Image, size: int, background: tuple[int, int, int] = WHITE, padding: float = 0.0
) -> Images:
    """Centres an image on an opaque square and resizes that.

    Args:
        image: any mode; transparency shows the background
        size: width and height of the result
        background: RGB
        padding: margin on each side, as a share of the longer side

    Returns:
        [size, size, 3] uint8
    """
    image = image.convert("RGBA")
    width, height = image.size
    side = round(max(width, height) * (1 + 2 * padding))
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    canvas.alpha_composite(image, ((side - width) // 2, (side - height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def opaque_share(image: Image.Image, above: int) -> float:
    """Returns the share of pixels whose alpha is above a value (0 .. 255)."""
    return float((np.asarray(image.convert("RGBA").getchannel("A")) > above).mean())


def resize_all(images: Images, size: int, resampling: Image.Resampling) -> Images:
    """Resizes each image to `size` x `size`. [N, H, W, 3] -> [N, size, size, 3] uint8."""
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), resampling)) for image in images])


def pixel_directions(images: Images) -> NDArray[np.float32]:
    """Returns mean-free pixels as unit vectors: their dot products are correlations. [N, D] float32."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    directions: NDArray[np.float32] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + np.float32(1e-6))
    return directions


def similar_pairs(images: Images, threshold: float, *, mirrored: bool = False) -> Iterator[tuple[int, int]]:
    """Yields each pair i < j of images whose correlation is above a threshold.

    Args:
        images: [N, H, W] or [N, H, W, 3] uint8
        threshold: correlation of the pixels, up to 1
        mirrored: whether an image also resembles the mirror image of another
    """
    directions = pixel_directions(images)
    others = [directions]
    if mirrored:
        others.append(pixel_directions(images[:, :, ::-1]))
    for start in range(0, len(images), _ROWS_AT_ONCE):
        for other in others:
            rows, columns = np.nonzero(directions[start : start + _ROWS_AT_ONCE] @ other.T > threshold)
            rows += start
            before = rows < columns
            yield from zip(rows[before].tolist(), columns[before].tolist(), strict=True)


def highest_correlation(images: Images, others: Images) -> NDArray[np.float32]:
    """For each image the correlation with the most similar of the others. [N] float32."""
    directions, targets = pixel_directions(images), pixel_directions(others)
    steps = range(0, len(images), _ROWS_AT_ONCE)
    return np.concatenate([(directions[start : start + _ROWS_AT_ONCE] @ targets.T).max(1) for start in steps])


def cluster(count: int, pairs: Iterable[tuple[int, int]]) -> Ints:
    """Joins the items that pairs connect; returns the item each one's cluster is named after. [count] int64.

    The second item of a joining pair gives its cluster's name to both. Names give later draws their order.
    """
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in pairs:
        parent[root(first)] = root(second)
    return np.array([root(item) for item in range(count)], dtype=np.int64)


def draw_groups(
    groups: Ints,
    sizes: Ints,
    rng: np.random.Generator,
    wanted: float,
    *,
    overshoot: bool = False,
    eligible: Bools | None = None,
) -> Ints:
    """Draws whole groups in random order until about `wanted` items are in them.

    Args:
        groups: names of different groups. [G] int64
        sizes: number of items that each group counts for. [G] int64
        rng: gives the order
        wanted: number of items
        overshoot: whether the last group may exceed `wanted`; if not, groups that do not fit are passed over
        eligible: groups that may be drawn at all; default all. [G] bool

    Returns:
        the drawn groups, in the order of the draw. int64
    """
    drawn, total = [], 0
    for index in rng.permutation(len(groups)):
        if eligible is not None and not eligible[index]:
            continue
        size = int(sizes[index])
        if total < wanted if overshoot else total + size <= wanted:
            drawn.append(groups[index])
            total += size
    return np.array(drawn, dtype=np.int64)


def sampled(arrays: TaskArrays, task: str, train_size: int, test_size: int) -> TaskArrays:
    """Draws a sample of each part that is larger than wanted; the order is kept.

    Args:
        arrays: the whole task
        task: its name, which places it in the stream that all samples are drawn from
        train_size: number of train images wanted
        test_size: number of test images wanted
    """
    rng = sample_stream(task)
    train, test = len(arrays.train_images), len(arrays.test_images)
    train_kept = np.sort(rng.permutation(train)[:train_size]) if train > train_size else np.arange(train)
    test_kept = np.sort(rng.permutation(test)[:test_size]) if test > test_size else np.arange(test)
    return replace(
        _with_train(arrays, train_kept),
        test_images=arrays.test_images[test_kept],
        test_labels=arrays.test_labels[test_kept],
    )


def sample_stream(task: str) -> np.random.Generator:
    """Returns the stream that samples are drawn from, placed after the draws of the tasks before this one."""
    rng = np.random.default_rng(0)
    for name, size in _SAMPLED_PARTS:
        if name == task:
            return rng
        rng.permutation(size)
    raise KeyError(task)


def without_test_images(arrays: TaskArrays) -> TaskArrays:
    """Drops the train images that equal a test image byte by byte."""
    test = {image.tobytes() for image in arrays.test_images}
    kept = np.flatnonzero([image.tobytes() not in test for image in arrays.train_images])
    return _with_train(arrays, kept)


def _with_train(arrays: TaskArrays, kept: Ints) -> TaskArrays:
    return replace(
        arrays,
        train_images=arrays.train_images[kept],
        train_labels=arrays.train_labels[kept],
        train_groups=None if arrays.train_groups is None else arrays.train_groups[kept],
    )
