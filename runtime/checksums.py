"""Checksums of files: made at export, compared before a bundle is used, large files in pieces side by side."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from runtime.bundle import PIECE_BYTES, FileSpec, Verify
from runtime.errors import BundleError
from runtime.machine import processors


def sha256_of_file(path: Path) -> str:
    """Hex digest, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_spec(path: Path) -> FileSpec:
    """Size and checksums of a file."""
    size = path.stat().st_size
    with ThreadPoolExecutor(processors()) as pool:
        whole = pool.submit(sha256_of_file, path)
        starts = range(0, size, PIECE_BYTES) if size > PIECE_BYTES else ()
        pieces = pool.map(lambda start: _sha256_of_piece(path, start), starts)
        return FileSpec(size, whole.result(), tuple(pieces))


def file_specs(directory: Path) -> dict[str, FileSpec]:
    """Those of all files in a directory, by name."""
    return {path.name: file_spec(path) for path in sorted(directory.iterdir())}


def check_files(
    directory: Path, files: Mapping[str, FileSpec], verify: Verify = "full", *, threads: int | None = None
) -> None:
    """Compare every listed file with its size and, with `verify="full"`, its sha256 or those of its pieces.

    Args:
        directory: of the bundle.
        files: name -> what is expected.
        verify: see above.
        threads: that hash side by side; None takes every processor.

    Raises:
        BundleError: naming every missing, resized or changed file.
    """
    with ThreadPoolExecutor(threads or processors()) as pool:
        pending: dict[str, list[Future[bool]]] = {}
        problems: dict[str, str] = {}
        for name, spec in files.items():
            path = directory / name
            try:
                if not path.is_file():
                    problems[name] = f"{name} is missing"
                elif (size := path.stat().st_size) != spec.bytes:
                    problems[name] = f"{name} has {size} bytes, expected {spec.bytes}"
                elif verify == "full":
                    pending[name] = list(_comparisons(pool, path, spec))
            except OSError as error:
                problems[name] = f"{name} cannot be read ({error.strerror})"
        for name, comparisons in pending.items():
            try:
                if not all(comparison.result() for comparison in comparisons):
                    problems[name] = f"{name} was changed (its sha256 differs from the manifest's)"
            except OSError as error:
                problems[name] = f"{name} cannot be read ({error.strerror})"
    if problems:
        found = "; ".join(problems[name] for name in files if name in problems)
        raise BundleError(f"{directory}: {found}. Copy or export the bundle again.")


def _comparisons(pool: ThreadPoolExecutor, path: Path, spec: FileSpec) -> Iterator[Future[bool]]:
    """Whether a file, or each of its pieces, is as expected."""
    if not spec.pieces:
        yield pool.submit(lambda: sha256_of_file(path) == spec.sha256)
    for index, expected in enumerate(spec.pieces):
        yield pool.submit(_is_piece, path, index * PIECE_BYTES, expected)


def _is_piece(path: Path, start: int, sha256: str) -> bool:
    return _sha256_of_piece(path, start) == sha256


def _sha256_of_piece(path: Path, start: int) -> str:
    """Of a piece that is mapped, which spares a copy of every byte."""
    with path.open("rb") as file:
        length = min(PIECE_BYTES, os.fstat(file.fileno()).st_size - start)
        if length <= 0:  # the file has been cut off
            return hashlib.sha256().hexdigest()
        with mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ) as piece:
            return hashlib.sha256(piece).hexdigest()
