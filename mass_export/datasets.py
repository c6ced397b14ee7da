"""Labelled images of a task, from a compressed array file or from a folder per class.

    DATA/data/<task>/<split>.npz                 images uint8 [N, H, W] or [N, H, W, 3], labels int64 [N]
    DATA/<task>/<split>/<class>/<image>.png      one folder per class, named as in the recipe

Either form may lie under DATA or under DATA/data. Nothing is unpickled. Images of folders are decoded batch
by batch; an array file is read when its task's turn comes.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.errors import DataError
from mass_export.spec import TaskInfo
from runtime.bundle import PreprocessSpec
from runtime.errors import InputError
from runtime.preprocess import ImageSource, pixel_values_from_images

DEFAULT_SPLIT = "test"
BATCH_SIZE = 64
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
MAX_ARRAY_BYTES = 8 << 30
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    SyntaxError,
    KeyError,
)  # SyntaxError: a header of numpy's


@dataclass(frozen=True)
class LabelledImages:
    """Images of one task and split with their true classes.

    Attributes:
        where: file or folder, for messages.
        sources: uint8 arrays or paths.
        labels: index into the task's classes. [N] int64
    """

    where: Path
    sources: Sequence[ImageSource]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """N."""
        return len(self.sources)

    def sample(self, count: int) -> LabelledImages:
        """At most `count` images: a fixed random sample, because files are often sorted or periodic in the class."""
        if len(self) <= count:
            return self
        rows = np.sort(np.random.default_rng(0).choice(len(self), count, replace=False))
        return LabelledImages(self.where, [self.sources[row] for row in rows.tolist()], self.labels[rows])

    def pixel_values(self, spec: PreprocessSpec) -> NDArray[np.float32]:
        """All images at once, [N, 3, H, W] float32."""
        return np.concatenate([pixel_values for pixel_values, _ in self.batches(spec)])

    def batches(
        self, spec: PreprocessSpec, size: int = BATCH_SIZE
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Preprocessed images and their labels, in order: [B, 3, H, W] float32, [B] int64.

        Raises:
            DataError: an image cannot be read; it is named.
        """
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            try:
                pixel_values = pixel_values_from_images(self.sources[rows], spec, first_index=start)
            except InputError as error:
                raise DataError(f"{self.where}: {error}") from error
            yield pixel_values, self.labels[rows]


def load_labelled_images(data: Path, task: TaskInfo, split: str = DEFAULT_SPLIT) -> LabelledImages:
    """Find and check the images of a task.

    Args:
        data: directory with the files of all tasks.
        task: its name is that of the folder, its classes are the labels' meaning.
        split: such as `test` or `val`.

    Raises:
        DataError: there are none, or they do not fit the task.
    """
    place = find_images(data, task.name, split)
    if place is None:
        array_file, folder = _places(data, task.name, split)[0][0], _places(data, task.name, split)[1][1]
        raise DataError(
            f"{data}: no images of task {task.name!r}, split {split!r}: expected {array_file} or the folder "
            f"{folder} with one folder per class."
        )
    return _from_class_folders(place, task) if place.is_dir() else _from_array_file(place, task)


def find_images(data: Path, task: str, split: str) -> Path | None:
    """The array file or the folder with the images of a task, or None."""
    for array_file, folder in _places(data, task, split):
        if array_file.is_file():
            return array_file
        if folder.is_dir():
            return folder
    return None


def _places(data: Path, task: str, split: str) -> list[tuple[Path, Path]]:
    return [(place / f"{split}.npz", place / split) for place in (data / "data" / task, data / task)]


def read_arrays(file: Path, *names: str) -> list[NDArray[Any]]:
    """Arrays of an `.npz` file by name; nothing is unpickled, and what would unpack to more than 8 GiB is refused.

    Raises:
        DataError: no such file, damaged, too large, or without one of the arrays.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        with np.load(file, allow_pickle=False) as arrays:
            missing = set(names) - set(arrays.files)
            found = [arrays[name] for name in names] if not missing and size <= MAX_ARRAY_BYTES else []
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        *_DAMAGED,
    ) as error:
        raise DataError(f"{file}: not an array file that numpy.savez wrote ({error}).") from error
    if size > MAX_ARRAY_BYTES:
        raise DataError(f"{file}: {size} bytes when unpacked, more than {MAX_ARRAY_BYTES}; use folders.")
    if missing:
        raise DataError(f"{file}: no array named {' or '.join(sorted(missing))}.")
    return found


def _from_array_file(file: Path, task: TaskInfo) -> LabelledImages:
    images, labels = read_arrays(file, "images", "labels")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise DataError(
            f"{file}: images: expected uint8 [N, H, W] or [N, H, W, 3], got {images.dtype} "
            f"{list(images.shape)}."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(
            f"{file}: labels: expected {len(images)} integers, one per image, got {labels.dtype} "
            f"{list(labels.shape)}."
        )
    if images.size == 0:
        raise DataError(f"{file}: holds no images.")
    outside = labels[(labels < 0) | (labels >= len(task.classes))]
    if len(outside):
        raise DataError(
            f"{file}: {len(outside)} label(s) out of range, such as {outside[0]}: task {task.name!r} has "
            f"{len(task.classes)} classes, counted from 0."
        )
    return LabelledImages(file, list(images), labels.astype(np.int64))


def _from_class_folders(folder: Path, task: TaskInfo) -> LabelledImages:
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    unknown = [path.name for path in folders if path.name not in task.classes]
    if unknown:
        raise DataError(
            f"{folder}: folder(s) that are no class of task {task.name!r}: {', '.join(unknown[:8])}. "
            f"Its classes: {', '.join(task.classes[:8])}{', ..' if len(task.classes) > 8 else ''}."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for class_folder in folders:
        found = [path for path in sorted(class_folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        paths += found
        labels += [task.classes.index(class_folder.name)] * len(found)
    if not paths:
        raise DataError(
            f"{folder}: no images in class folders; expected files such as {task.classes[0]}/1.png."
        )
    return LabelledImages(folder, paths, np.array(labels, np.int64))
