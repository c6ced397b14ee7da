"""Engines of a bundle: build what is missing or stale, list it in the manifest, leave the rest alone."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from mass_export.engine_int8 import Peaks, calibration_images, find_peaks, write_quantised
from mass_export.precision import write_converted
from mass_export.progress import Progress
from runtime.bundle import FIRST_PASS, MANIFEST_FILE, SECOND_PASS, Manifest
from runtime.checksums import check_files, file_spec, sha256_of_file
from runtime.engine_build import build_engine
from runtime.engine_keys import engine_file_name, engine_key
from runtime.engine_settings import EngineSettings, find_tensorrt
from runtime.engine_spec import EngineKey, EngineSpec, Precision
from runtime.errors import EngineError
from runtime.graph_files import check_graph_files
from runtime.integrity import graph_files
from runtime.manifest import json_from_manifest, read_manifest


@dataclass(frozen=True)
class BuiltEngine:
    """One engine after `build_engines`.

    Attributes:
        spec: as the manifest lists it.
        note: `built`, `up to date`, or why an older one was replaced.
        nbytes: its size.
        build_s: the time it took; 0 if it was up to date.
    """

    spec: EngineSpec
    note: str
    nbytes: int
    build_s: float


def build_engines(
    bundle: Path, settings: EngineSettings, *, progress: Progress, timing_cache: Path | None = None
) -> list[BuiltEngine]:
    """Build the engines of both passes beside the ONNX files.

    Everything is built in a directory beside the bundle. Files move into it and the manifest is replaced only
    when both engines are there; killed before, the bundle is what it was. Engine files have names of their own
    for each key, so that the manifest never lists a file that another one replaced.

    Args:
        bundle: directory that mass-export wrote.
        settings: what to build.
        progress: where to show it.
        timing_cache: see `runtime.engine_build.build_engine`.

    Raises:
        EngineError: TensorRT is missing or refuses.
        BundleError: the bundle is damaged.
    """
    manifest = read_manifest(bundle)
    engine_files = {engine.file for engine in manifest.engines}
    check_files(bundle, {name: spec for name, spec in manifest.files.items() if name not in engine_files})
    for name in graph_files(manifest):
        check_graph_files(bundle / name, manifest.files)
    tensorrt = find_tensorrt(settings.flavour)
    precision = _precision(settings, manifest)
    int8 = _Int8(bundle, manifest, settings, progress) if precision == "int8" else None
    with tempfile.TemporaryDirectory(
        prefix=f".{bundle.name}.engines.", dir=bundle.absolute().parent
    ) as scratch:
        staged = Path(scratch)
        built = []
        for name in progress.track((FIRST_PASS, SECOND_PASS), "Engines"):
            key = engine_key(manifest, name, tensorrt, precision, settings)
            if int8 is not None:
                key = dataclasses.replace(key, options=tuple(sorted((*key.options, int8.images.describe()))))
            known = _known(bundle, manifest, name, key)
            if isinstance(known, BuiltEngine):
                built.append(known)
                continue
            start = time.perf_counter()
            onnx_file = bundle / manifest.passes[name].file
            if int8 is not None:
                onnx_file = int8.write(name, staged / name)
            elif precision != manifest.precision:
                onnx_file = write_converted(onnx_file, staged / name, precision)
            with progress.bar(f"Building {name}") as show:
                plan = build_engine(
                    onnx_file,
                    manifest.passes[name],
                    key.profiles,
                    tensorrt=tensorrt,
                    settings=settings,
                    show=show,
                    timing_cache=timing_cache,
                )
            spec = EngineSpec(name, engine_file_name(name, key), key)
            (staged / spec.file).write_bytes(plan)
            built.append(BuiltEngine(spec, known or "built", len(plan), time.perf_counter() - start))
        _install(bundle, manifest, built, staged)
    return built


class _Int8:
    """The graphs of int8 engines; calibrates when the first of them is wanted."""

    def __init__(
        self, bundle: Path, manifest: Manifest, settings: EngineSettings, progress: Progress
    ) -> None:
        self.images = calibration_images(manifest, settings.calibration_images)
        self._bundle, self._manifest, self._progress = bundle, manifest, progress
        self._random = settings.calibration_images is None
        self._peaks: Peaks | None = None

    def write(self, pass_name: str, directory: Path) -> Path:
        """Write a pass; returns its ONNX file."""
        if self._peaks is None:
            if self._random:
                warnings.warn(
                    "int8: scales are set on random images, and larger values of real ones would be clipped; set "
                    "them on yours with --calibration-images FOLDER.",
                    stacklevel=3,
                )
            self._peaks = find_peaks(self._bundle, self.images.pixel_values, self._progress)
        onnx_file = self._bundle / self._manifest.passes[pass_name].file
        return write_quantised(onnx_file, directory, self._peaks[pass_name])


def _precision(settings: EngineSettings, manifest: Manifest) -> Precision:
    precision = settings.precision or manifest.precision
    if manifest.for_cpus:
        raise EngineError("precision: graphs of this bundle are int8, for CPUs; export it as fp32.")
    if manifest.precision not in ("fp32", precision):
        raise EngineError(
            f"precision: the graphs of this bundle are {manifest.precision}; export it as fp32 to build {precision}."
        )
    if settings.calibration_images is not None and precision != "int8":
        raise EngineError(f"calibration_images: goes with precision int8, got {precision}.")
    if settings.weight_stripped and precision == "int8":
        raise EngineError(
            "weight_stripped: the weights of int8 engines stand in no ONNX file of the bundle; leave the option out."
        )
    if settings.weight_stripped and precision != manifest.precision:
        raise EngineError(
            f"weight_stripped: the weights come from the ONNX files, which are {manifest.precision}; export the "
            f"bundle with --precision {precision} first."
        )
    return precision


def _known(bundle: Path, manifest: Manifest, pass_name: str, key: EngineKey) -> BuiltEngine | str | None:
    """The engine if it is up to date, why it is stale, or None if there is none for this target."""
    for engine in manifest.engines:
        if engine.pass_name != pass_name or not _same_target(engine.key, key):
            continue
        path, listed = bundle / engine.file, manifest.files[engine.file]
        if engine.key != key:
            changed = [
                f.name for f in dataclasses.fields(key) if getattr(key, f.name) != getattr(engine.key, f.name)
            ]
            return f"rebuilt, because of another {', '.join(changed)}"
        if not path.is_file() or sha256_of_file(path) != listed.sha256:
            return "rebuilt, because the file was missing or damaged"
        return BuiltEngine(engine, "up to date", listed.bytes, 0.0)
    return None


def _same_target(a: EngineKey, b: EngineKey) -> bool:
    return (a.flavour, a.compute_capability) == (b.flavour, b.compute_capability)


def _install(bundle: Path, manifest: Manifest, built: list[BuiltEngine], staged: Path) -> None:
    """Move new engines in, replace the manifest, then drop the files that it no longer lists."""
    new = [engine for engine in built if engine.build_s]
    if not new:
        return
    files = dict(manifest.files)
    for engine in new:
        path = staged / engine.spec.file
        files[engine.spec.file] = file_spec(path)
        path.replace(bundle / engine.spec.file)
    ours = {engine.spec.pass_name: engine.spec for engine in built}
    kept = [e for e in manifest.engines if not _same_target(e.key, ours[e.pass_name].key)]
    engines = (*kept, *ours.values())
    dropped = {e.file for e in manifest.engines} - {e.file for e in engines}
    for name in dropped:
        files.pop(name, None)
    updated = dataclasses.replace(manifest, files=dict(sorted(files.items())), engines=engines)
    replacement = staged / MANIFEST_FILE
    with replacement.open("w", encoding="utf-8") as file:
        file.write(json_from_manifest(updated))
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(bundle / MANIFEST_FILE)
    for name in dropped:
        (bundle / name).unlink(missing_ok=True)
