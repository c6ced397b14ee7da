"""Engines that are built where they run: a bundle without fitting ones gets them on first use, in a cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from runtime.bundle import FIRST_PASS, SECOND_PASS, Manifest
from runtime.checksums import sha256_of_file
from runtime.engine_build import build_engine
from runtime.engine_keys import engine_file_name, engine_key
from runtime.engine_monitor import terminal_bar
from runtime.engine_settings import EngineSettings, TensorRt, find_tensorrt
from runtime.engine_spec import EngineSpec
from runtime.errors import EngineError

TIMING_CACHE = "timing.cache"

_LOG = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Where engines and kernels for this GPU are kept: `MASS_CACHE`, or the user's cache."""
    given = os.environ.get("MASS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mass-export"


def cached_engines(
    directory: Path, manifest: Manifest, capability: str, max_batch: int
) -> tuple[EngineSpec, EngineSpec]:
    """Engines of both passes for this GPU, built if the cache has none.

    An engine's file name follows from its key: one for another graph, GPU, version or batch is never found. Beside
    it lies its sha256, written last; without it, or with another one, the engine is built again.

    Args:
        directory: of the bundle.
        manifest: of the bundle.
        capability: compute capability of this GPU.
        max_batch: largest batch that the engines take.

    Returns:
        Specs of the first and the second pass; their `file` is absolute.

    Raises:
        EngineError: TensorRT is missing or refuses, or the cache folder cannot be written.
    """
    tensorrt = find_tensorrt(None)
    settings = EngineSettings(
        tensorrt.flavour,
        manifest.precision,
        batch=(1, min(8, max_batch), max_batch),
        compute_capability=_target(tensorrt, capability),
    )
    folder = cache_directory() / "engines"
    first, second = (
        _cached_engine(directory, manifest, name, tensorrt, settings, folder)
        for name in (FIRST_PASS, SECOND_PASS)
    )
    return first, second


def _cached_engine(
    directory: Path, manifest: Manifest, name: str, tensorrt: TensorRt, settings: EngineSettings, folder: Path
) -> EngineSpec:
    key = engine_key(manifest, name, tensorrt, manifest.precision, settings)
    path = folder.absolute() / engine_file_name(name, key)
    spec, checksum = EngineSpec(name, str(path), key), path.with_suffix(".sha256")
    if path.is_file() and checksum.is_file():
        if checksum.read_text(encoding="ascii").strip() == sha256_of_file(path):
            return spec
        _LOG.warning("%s is damaged", path)
    _LOG.warning("building the engine of %s for this GPU, once; it is kept as %s", name, path)
    with terminal_bar(f"Building {name}") as show:
        plan = build_engine(
            directory / manifest.passes[name].file,
            manifest.passes[name],
            key.profiles,
            tensorrt=tensorrt,
            settings=settings,
            show=show,
            timing_cache=folder / TIMING_CACHE,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checksum.unlink(missing_ok=True)
        _write(path, plan)
        _write(checksum, hashlib.sha256(plan).hexdigest().encode("ascii"))
    except OSError as error:
        raise EngineError(
            f"{folder}: cannot keep engines here ({error}); set MASS_CACHE to a folder that can be written, or build "
            "them into the bundle with `mass build-engines`."
        ) from error
    return spec


def _target(tensorrt: TensorRt, capability: str) -> tuple[str, ...]:
    """TensorRT builds for its own GPU; TensorRT-RTX is told, unless it does not know the GPU yet."""
    if tensorrt.flavour == "tensorrt":
        return ()
    known = tensorrt.module.ComputeCapability.__members__
    return (capability,) if f"SM{capability.replace('.', '')}" in known else ()


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.replace(path)
