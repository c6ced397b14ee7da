"""Keys of engines: what one is built from and for, and the file name that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib

from runtime.bundle import Manifest
from runtime.cuda_device import compute_capability
from runtime.engine_settings import EngineSettings, TensorRt
from runtime.engine_spec import EngineKey, Precision


def engine_key(
    manifest: Manifest, pass_name: str, tensorrt: TensorRt, precision: Precision, settings: EngineSettings
) -> EngineKey:
    """The key of a pass' engine.

    Raises:
        BackendError: TensorRT builds for the GPU of this machine, and there is none.
    """
    capability = settings.compute_capability
    if tensorrt.flavour == "tensorrt" and not capability:
        capability = (compute_capability(),)
    return EngineKey(
        graph_sha256=graph_sha256(manifest, pass_name),
        flavour=tensorrt.flavour,
        version=tensorrt.version,
        compute_capability=tuple(sorted(capability)),
        precision=precision,
        profiles=settings.profiles(pass_name, manifest),
        options=settings.options(),
    )


def graph_sha256(manifest: Manifest, pass_name: str) -> str:
    """Hash of a pass' ONNX file and of all weights of the bundle, from the manifest's hashes."""
    graphs = {spec.file for spec in manifest.passes.values()}
    graphs |= set(manifest.one_task.files) if manifest.one_task is not None else set()
    weights = set(manifest.files) - graphs - {engine.file for engine in manifest.engines}
    names = (manifest.passes[pass_name].file, *sorted(weights))
    lines = [f"{name} {manifest.files[name].sha256}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def engine_file_name(pass_name: str, key: EngineKey) -> str:
    """A name that is the key's alone: `first_pass.tensorrt_rtx.fp16.3f2a..engine`."""
    digest = hashlib.sha256(repr(dataclasses.astuple(key)).encode()).hexdigest()[:12]
    return f"{pass_name}.{key.flavour}.{key.precision}.{digest}.engine"
