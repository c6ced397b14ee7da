"""The images of a batch job: a folder, Parquet, or WebDataset shards, cut into parts that are read as streams."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)
Kind = Literal["folder", "parquet", "webdataset"]


@dataclass(frozen=True)
class Part:
    """What one worker classifies at a time.

    Attributes:
        kind: of input.
        path: the folder, the Parquet file, or the shard.
        names: of a folder: the files, relative to it.
        row_group: of a Parquet file.
        column: there.
        rows: number of images; None for a shard, which is not read before.
        prefix: of the images' names.
        first_row: of a row group within its file.
    """

    kind: Kind
    path: str
    names: tuple[str, ...] = ()
    row_group: int = 0
    column: str = ""
    rows: int | None = None
    prefix: str = ""
    first_row: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Part:
        """The inverse of `to_dict`."""
        return cls(**{**values, "names": tuple(values["names"])})


def plan_parts(source: str, column: str, chunk: int) -> list[Part]:
    """Cut an input into parts; the same input gives the same parts.

    Args:
        source: a folder of images or of Parquet files or of shards, or one such file.
        column: of a Parquet input.
        chunk: images of a part of a folder; elsewhere a part is a row group or a shard.

    Raises:
        InputError: there is nothing to read, or no such column.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source}: no such folder or file.")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    shards = [p for p in files if p.suffix == ".tar"]
    tables = [p for p in files if p.suffix == ".parquet"]
    root = path.parent if path.is_file() else path
    if tables:
        return [part for file in tables for part in _row_groups(file, column, str(file.relative_to(root)))]
    if shards:
        return [Part("webdataset", str(file), prefix=str(file.relative_to(root))) for file in shards]
    names = [p.relative_to(root).as_posix() for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise InputError(
            f"{source}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}), .parquet or .tar files in it."
        )
    starts = range(0, len(names), chunk)
    slices = [tuple(names[i : i + chunk]) for i in starts]
    return [Part("folder", str(root), names=part, rows=len(part)) for part in slices]


def read_part(part: Part) -> Iterator[tuple[str, bytes | InputError]]:
    """Each image's name and content, or why it cannot be read, one at a time."""
    if part.kind == "folder":
        for name in part.names:
            yield name, _content(os.path.join(part.path, name))  # noqa: PTH118 - a million times
    elif part.kind == "parquet":
        yield from _rows(part)
    else:
        yield from _members(part)


def _content(path: str) -> bytes | InputError:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError as error:
        return InputError(f"cannot be read ({error.strerror}).")


def _row_groups(file: Path, column: str, prefix: str) -> list[Part]:
    import pyarrow as pa  # noqa: PLC0415 - of the extra `serve`
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a Parquet file ({error}).") from error
    names = table.schema_arrow.names
    if column not in names:
        raise InputError(f"{file}: no column {column!r}; it has {', '.join(names)} (--column).")
    parts, first = [], 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        parts.append(
            Part(
                "parquet",
                str(file),
                row_group=group,
                column=column,
                rows=rows,
                prefix=prefix,
                first_row=first,
            )
        )
        first += rows
    return parts


def _rows(part: Part) -> Iterator[tuple[str, bytes | InputError]]:
    import pyarrow.parquet as pq  # noqa: PLC0415

    row = part.first_row
    table = pq.ParquetFile(part.path)
    for batch in table.iter_batches(64, row_groups=[part.row_group], columns=[part.column]):
        for value in batch.column(0):
            content = value.as_py()
            if isinstance(content, dict):
                content = content.get("bytes")
            told = type(content).__name__
            found = content if isinstance(content, bytes) else InputError(f"expected bytes, got {told}.")
            yield f"{part.prefix}:{row}", found
            row += 1


def _members(part: Part) -> Iterator[tuple[str, bytes | InputError]]:
    done = 0
    try:
        with tarfile.open(part.path, "r|*") as shard:
            for member in shard:
                if not member.isfile() or os.path.splitext(member.name)[1].lower() not in IMAGE_SUFFIXES:  # noqa: PTH122
                    continue
                stream = shard.extractfile(member)
                content = stream.read() if stream is not None else b""
                done += 1
                yield f"{part.prefix}:{member.name}", content
    except (tarfile.TarError, OSError, EOFError) as error:
        yield part.prefix, InputError(f"the shard is damaged after {done} images ({error}).")


def total_rows(parts: Sequence[Part]) -> int | None:
    """Of all parts; None if a shard is among them."""
    counts = [part.rows for part in parts]
    return None if None in counts else sum(count for count in counts if count is not None)
