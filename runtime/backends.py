"""From the name of a provider to the sessions of both passes."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path

from runtime.bundle import FIRST_PASS, SECOND_PASS, Manifest
from runtime.cuda_device import compute_capability
from runtime.cuda_memory import CudaMemory
from runtime.engine_cache import cache_directory, cached_engines
from runtime.engine_spec import EngineKey, EngineSpec, Flavour, is_compatible
from runtime.errors import BackendError
from runtime.integrity import require_unchanged
from runtime.onnx_session import LazySession, OnnxProvider, OnnxSession, is_offered
from runtime.provider import Provider
from runtime.session import Session
from runtime.tensorrt_session import TensorRtSession

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")  # the first that fits is taken
AMPERE = 8.0  # portable engines run on it and on what came after it

_LOG = logging.getLogger(__name__)


def open_sessions(
    directory: Path,
    manifest: Manifest,
    provider: Provider,
    num_threads: int | None,
    *,
    core_cache_sets: int = 64,
    cuda_graphs: bool = False,
    build_engines: bool = True,
    max_batch: int = 32,
) -> tuple[Session, Session]:
    """Load both passes.

    Args:
        directory: of the bundle.
        manifest: of the bundle.
        provider: `auto` takes TensorRT where it is installed and there is a GPU, then CUDA, then the CPU; any other
            is taken or is an error.
        num_threads: threads within an operator on the CPU; None lets the backend choose.
        core_cache_sets: sets of tasks whose cores stay on the GPU.
        cuda_graphs: let engines record and replay their kernels.
        build_engines: where the bundle has no engines for this GPU, build them into the cache.
        max_batch: largest batch that these take.

    Returns:
        Sessions of the first and the second pass.

    Raises:
        BackendError: the provider is not available or refuses a pass.
    """

    def open_tensorrt() -> tuple[Session, Session]:
        engines = _find_engines(directory, manifest, max_batch if build_engines else None)
        return _open_engines(directory, manifest, engines, core_cache_sets, cuda_graphs=cuda_graphs)

    provider = _for_precision(provider, manifest)
    if provider == "tensorrt":
        if not manifest.engines and not _may_be_installed() and is_offered("tensorrt"):
            return _open_both(directory, manifest, "tensorrt", None)
        return open_tensorrt()
    if provider != "auto":
        return _open_both(directory, manifest, provider, num_threads)
    if _may_be_installed():
        try:
            return open_tensorrt()
        except BackendError as error:
            _LOG.info("TensorRT did not start, trying CUDA: %s", error)
    if is_offered("cuda"):
        try:
            return _open_both(directory, manifest, "cuda", num_threads)
        except BackendError as error:
            _LOG.info("CUDA did not start, taking the CPU: %s", error)
    return _open_both(directory, manifest, "cpu", num_threads)


def _for_precision(provider: Provider, manifest: Manifest) -> Provider:
    if not manifest.for_cpus:
        return provider
    if provider not in ("auto", "cpu"):
        raise BackendError(
            f"provider {provider!r}: int8 bundles are for CPUs; export fp32 or fp16 for a GPU."
        )
    return "cpu"


def choose_engines(manifest: Manifest, capability: str) -> tuple[EngineSpec, EngineSpec] | None:
    """Engines of both passes for a GPU and for what is installed, TensorRT's before TensorRT-RTX's; None without any.

    Args:
        manifest: of the bundle.
        capability: compute capability of the GPU, such as `8.6`.
    """
    installed = _installed()
    for flavour, version in installed.items():
        ours = [engine for engine in manifest.engines if engine.key.flavour == flavour]
        fitting = {
            engine.pass_name: engine
            for engine in ours
            if _fits(engine.key, capability) and is_compatible(engine.key, version)
        }
        if fitting.keys() == manifest.passes.keys():
            return fitting[FIRST_PASS], fitting[SECOND_PASS]
    return None


def _may_be_installed() -> list[Flavour]:
    """What can be found, without importing it."""
    return [flavour for flavour in FLAVOURS if importlib.util.find_spec(flavour) is not None]


def _installed() -> dict[Flavour, str]:
    """Versions of what can be imported."""
    found: dict[Flavour, str] = {}
    for flavour in _may_be_installed():
        try:
            found[flavour] = str(importlib.import_module(flavour).__version__)
        except (ImportError, OSError) as error:
            _LOG.warning("%s is installed but does not import (%s)", flavour, error)
    return found


def _fits(key: EngineKey, capability: str) -> bool:
    if capability in key.compute_capability:
        return True
    portable = "hardware_compatible" in key.options or not key.compute_capability
    return portable and float(capability) >= AMPERE


def _find_engines(
    directory: Path, manifest: Manifest, max_batch: int | None
) -> tuple[EngineSpec, EngineSpec]:
    """Engines of the bundle, or of the cache; `max_batch` None forbids to build."""
    try:
        capability = compute_capability()
    except BackendError as error:
        raise BackendError(f"TensorRT needs an NVIDIA GPU: {error}") from error
    installed = _installed()
    if found := choose_engines(manifest, capability):
        return found
    here = ", ".join(f"{flavour} {version}" for flavour, version in installed.items())
    targets = {f"{e.key.flavour} {e.key.version} for {_targets(e.key)}" for e in manifest.engines}
    missing = (
        f"the bundle has no engines for compute capability {capability} and {here or 'no TensorRT'}; its engines: "
        f"{'; '.join(sorted(targets)) or 'none'}"
    )
    if max_batch is None or not installed:
        raise BackendError(
            f"{missing}. Build engines for this GPU with `mass build-engines`, or install what built those of the "
            "bundle."
        )
    if manifest.engines:
        _LOG.warning("%s", missing)
    return cached_engines(directory, manifest, capability, max_batch)


def _targets(key: EngineKey) -> str:
    return ", ".join(key.compute_capability) or "Ampere and later"


def _open_engines(
    directory: Path,
    manifest: Manifest,
    engines: tuple[EngineSpec, EngineSpec],
    max_sets: int,
    *,
    cuda_graphs: bool,
) -> tuple[Session, Session]:
    memory = CudaMemory()
    try:
        opened = [
            TensorRtSession(
                directory,
                engine,
                manifest.passes[engine.pass_name],
                memory,
                max_sets=max_sets,
                cuda_graphs=cuda_graphs,
                cache_directory=cache_directory(),
            )
            for engine in engines
        ]
    except BaseException:
        memory.close()
        raise
    return opened[0], opened[1]


def _open_both(
    directory: Path, manifest: Manifest, provider: OnnxProvider, num_threads: int | None
) -> tuple[Session, Session]:
    first, second = (directory / manifest.passes[name].file for name in (FIRST_PASS, SECOND_PASS))
    if provider == "cpu" and manifest.one_task is not None:  # then only sets of several tasks need the second

        def unchanged() -> None:
            require_unchanged(directory, manifest)

        routed = bool(manifest.one_task.routers)  # and nothing the first
        opened = (
            LazySession(first, num_threads, unchanged)
            if routed
            else OnnxSession(first, provider, num_threads)
        )
        return opened, LazySession(second, num_threads, unchanged)
    return OnnxSession(first, provider, num_threads), OnnxSession(second, provider, num_threads)
