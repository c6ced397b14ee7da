"""From the name of a provider to the sessions of both passes."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Literal

from runtime.bundle import FIRST_PASS, SECOND_PASS, Manifest, OneTaskSpec
from runtime.cuda_device import compute_capability
from runtime.cuda_memory import CudaMemory
from runtime.engine_spec import EngineKey, EngineSpec
from runtime.errors import BackendError
from runtime.onnx_session import LazySession, OnnxProvider, OnnxSession, is_offered
from runtime.session import Session
from runtime.tensorrt_session import TensorRtSession

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]

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
) -> tuple[Session, Session]:
    """Load both passes.

    Args:
        directory: of the bundle.
        manifest: of the bundle.
        provider: `auto` takes TensorRT where the bundle has engines for this GPU, then CUDA, then the CPU; any other
            is taken or is an error.
        num_threads: threads within an operator on the CPU; None lets the backend choose.
        core_cache_sets: sets of tasks whose cores stay on the GPU.
        cuda_graphs: let engines record and replay their kernels.

    Returns:
        Sessions of the first and the second pass.

    Raises:
        BackendError: the provider is not available or refuses a pass.
    """
    if provider == "tensorrt":
        return _open_tensorrt(directory, manifest, core_cache_sets, cuda_graphs=cuda_graphs)
    if provider != "auto":
        return _open_both(directory, manifest, provider, num_threads)
    if manifest.engines:
        try:
            return _open_tensorrt(directory, manifest, core_cache_sets, cuda_graphs=cuda_graphs)
        except BackendError as error:
            _LOG.info("TensorRT did not start, trying CUDA: %s", error)
    if is_offered("cuda"):
        try:
            return _open_both(directory, manifest, "cuda", num_threads)
        except BackendError as error:
            _LOG.info("CUDA did not start, taking the CPU: %s", error)
    return _open_both(directory, manifest, "cpu", num_threads)


def choose_engines(manifest: Manifest, capability: str) -> tuple[EngineSpec, EngineSpec]:
    """Engines of both passes for a GPU, TensorRT's before TensorRT-RTX's.

    Args:
        manifest: of the bundle.
        capability: compute capability of the GPU, such as `8.6`.

    Raises:
        BackendError: there are none for this GPU, or what built them is not installed.
    """
    for flavour in ("tensorrt", "tensorrt_rtx"):
        ours = [engine for engine in manifest.engines if engine.key.flavour == flavour]
        fitting = {engine.pass_name: engine for engine in ours if _fits(engine.key, capability)}
        if fitting.keys() == manifest.passes.keys() and importlib.util.find_spec(flavour) is not None:
            return fitting[FIRST_PASS], fitting[SECOND_PASS]
    listed = sorted(
        {f"{e.key.flavour} for {', '.join(e.key.compute_capability) or 'any GPU'}" for e in manifest.engines}
    )
    raise BackendError(
        f"no usable TensorRT engines for compute capability {capability}: the bundle has {'; '.join(listed)}. Install "
        "what built them, or build engines for this GPU with `mass build-engines`."
    )


def cache_directory() -> Path:
    """Where kernels that were compiled for this GPU are kept: `MASS_CACHE`, or the user's cache."""
    given = os.environ.get("MASS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mass-export"


def _fits(key: EngineKey, capability: str) -> bool:
    if capability in key.compute_capability:
        return True
    portable = "hardware_compatible" in key.options or not key.compute_capability
    return portable and float(capability) >= AMPERE


def _open_tensorrt(
    directory: Path, manifest: Manifest, max_sets: int, *, cuda_graphs: bool
) -> tuple[Session, Session]:
    if not manifest.engines:
        if is_offered("tensorrt"):
            return _open_both(directory, manifest, "tensorrt", None)
        raise BackendError(
            "this bundle has no TensorRT engines; build them with `mass build-engines`, or use provider='cuda'."
        )
    first, second = choose_engines(manifest, compute_capability())
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
            for engine in (first, second)
        ]
    except BaseException:
        memory.close()
        raise
    return opened[0], opened[1]


def open_one_task(directory: Path, spec: OneTaskSpec, num_threads: int | None) -> Session:
    """Load the one-task graph on the CPU.

    Raises:
        BackendError: ONNX Runtime refuses it.
    """
    return OnnxSession(directory / spec.file, "cpu", num_threads)


def _open_both(
    directory: Path, manifest: Manifest, provider: OnnxProvider, num_threads: int | None
) -> tuple[Session, Session]:
    first, second = (directory / manifest.passes[name].file for name in (FIRST_PASS, SECOND_PASS))
    if provider == "cpu" and manifest.one_task is not None:  # then only sets of several tasks need the second
        return OnnxSession(first, provider, num_threads), LazySession(second, num_threads)
    return OnnxSession(first, provider, num_threads), OnnxSession(second, provider, num_threads)
