"""Is a bundle whole, closed and still the one that was read? Checks beyond those of single files in `bundle`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from runtime.bundle import MANIFEST_FILE, FileSpec, Manifest, Verify
from runtime.checksums import check_files
from runtime.errors import BundleError
from runtime.graph_files import check_graph_files
from runtime.manifest import read_manifest


def check_bundle(directory: Path, manifest: Manifest, verify: Verify = "full") -> None:
    """Check every file, and that the graphs read nothing but listed files.

    Args:
        directory: of the bundle.
        manifest: of the bundle.
        verify: as for `check_files`.

    Raises:
        BundleError: naming what is missing, resized, changed or unsafe.
    """
    check_files(directory, manifest.files, verify)
    for name in graph_files(manifest):
        check_graph_files(directory / name, manifest.files)


@contextmanager
def hashed_meanwhile(
    directory: Path, manifest: Manifest, verify: Verify, threads: int | None
) -> Iterator[None]:
    """With `full` hash the files of a bundle while the body loads them; with `size` do no more.

    Args:
        directory: of the bundle.
        manifest: of the bundle.
        verify: as for `check_files`.
        threads: that hash; None takes every processor.

    Raises:
        BundleError: of `check_files`, rather than what the body makes of changed files.
    """
    if verify == "size":
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_files, directory, manifest.files, verify, threads=threads)
        try:
            yield
        finally:
            checked.result()


def graph_files(manifest: Manifest) -> list[str]:
    """Names of the ONNX files."""
    names = [spec.file for spec in manifest.passes.values()]
    return names if manifest.one_task is None else [*names, *manifest.one_task.files]


def extra_files(directory: Path, manifest: Manifest) -> list[str]:
    """What lies in the directory without being listed; it is never read. Hidden files do not count."""
    known = {*manifest.files, MANIFEST_FILE}
    return sorted(p.name for p in directory.iterdir() if p.name not in known and not p.name.startswith("."))


def require_unchanged(directory: Path, manifest: Manifest) -> None:
    """Refuse to go on where a bundle of other weights has taken the directory's name since `manifest` was read.

    Raises:
        BundleError: it has, or the directory is gone.
    """
    if _weights(read_manifest(directory)) != _weights(manifest):
        raise BundleError(f"{directory}: the bundle was replaced while it was in use; load it again.")


def _weights(manifest: Manifest) -> dict[str, FileSpec]:
    engines = {engine.file for engine in manifest.engines}
    return {name: spec for name, spec in manifest.files.items() if name not in engines}
