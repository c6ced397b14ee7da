"""ONNX -> TensorRT engine: one path for TensorRT 10, TensorRT 11 and TensorRT-RTX.

Networks are strongly typed: TensorRT computes in exactly the types that the graph says, and chooses none itself.
The rest is profiles, limits and flags, each checked, because TensorRT reports most of what it refuses only to
its logger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.bundle import PassSpec
from runtime.cuda_device import compute_capability
from runtime.engine_monitor import Show, make_monitor, run_cancellably
from runtime.engine_network import check_network, parse_network
from runtime.engine_settings import EngineSettings, TensorRt
from runtime.engine_spec import Profile, shape_with
from runtime.errors import BackendError, EngineError
from runtime.tensorrt_log import make_logger


def build_engine(
    onnx_file: Path,
    spec: PassSpec,
    profiles: Sequence[Profile],
    *,
    tensorrt: TensorRt,
    settings: EngineSettings,
    show: Show,
    timing_cache: Path | None = None,
) -> bytes:
    """Build and serialise the engine of one pass.

    Ctrl-C ends the build at TensorRT's next step.

    Args:
        onnx_file: typed graph; its external data lies beside it.
        spec: the pass as the manifest describes it; the parsed network must have the same inputs and outputs.
        profiles: dimensions to build for.
        tensorrt: what builds.
        settings: limits and flags.
        show: takes TensorRT's current phase, its step and its number of steps.
        timing_cache: TensorRT's measurements, read if the file exists and written back; TensorRT-RTX has none.

    Raises:
        EngineError: the graph, a setting or the machine is refused; the message carries TensorRT's own.
    """
    trt = tensorrt.module
    _require_gpu_for(settings, tensorrt)
    log = make_logger(trt)
    builder = _started(lambda: trt.Builder(log), tensorrt, log)
    network, _parser = parse_network(onnx_file, builder, tensorrt, log)
    check_network(network, spec, onnx_file)
    config = _configured(builder, network, spec, profiles, tensorrt, settings)
    cache = _attach_timing_cache(config, tensorrt, timing_cache)
    monitor = make_monitor(trt, show)
    config.progress_monitor = monitor
    plan = run_cancellably(lambda: builder.build_serialized_network(network, config), monitor)
    if plan is None:
        raise EngineError(f"{onnx_file}: {tensorrt.flavour} cannot build the engine: {log.text()}")
    if cache is not None and timing_cache is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        timing_cache.write_bytes(bytes(cache.serialize()))
    return bytes(plan)


def _started(make: Callable[[], Any], tensorrt: TensorRt, log: Any) -> Any:
    try:
        builder = make()
    except Exception as error:  # noqa: BLE001 - pybind turns a failed construction into TypeError or RuntimeError
        builder, reason = None, f"{error}"
    else:
        reason = log.text()
    if builder is None:
        raise EngineError(
            f"{tensorrt.flavour} {tensorrt.version} does not start here ({reason}). TensorRT needs the GPU that "
            "it builds for; TensorRT-RTX builds without one."
        )
    return builder


def _require_gpu_for(settings: EngineSettings, tensorrt: TensorRt) -> None:
    """TensorRT-RTX runs kernels while it strips weights; without a GPU it fails with a check of its own."""
    if not settings.weight_stripped or tensorrt.flavour != "tensorrt_rtx":
        return
    try:
        compute_capability()
    except BackendError as error:
        raise EngineError(
            f"weight_stripped: tensorrt_rtx needs a GPU to strip the weights. Leave the option out, or build on a "
            f"machine with a GPU. Here: {error}"
        ) from error


def _configured(
    builder: Any,
    network: Any,
    spec: PassSpec,
    profiles: Sequence[Profile],
    tensorrt: TensorRt,
    settings: EngineSettings,
) -> Any:
    trt, config = tensorrt.module, builder.create_builder_config()
    flags = {
        "TF32": settings.tf32,
        "VERSION_COMPATIBLE": settings.version_compatible,
        "STRIP_PLAN": settings.weight_stripped,
        "REFIT_IDENTICAL": settings.weight_stripped,
    }
    for name, wanted in flags.items():
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None:
            _require(not wanted, f"{tensorrt.flavour} {tensorrt.version} has no builder flag {name}.")
        elif wanted:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.hardware_compatible:
        _require(tensorrt.flavour == "tensorrt", "hardware_compatible: TensorRT-RTX engines always are.")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    _set_compute_capabilities(config, tensorrt, settings.compute_capability)
    for dims in profiles:
        config.add_optimization_profile(_profile(builder, network, spec, dims))
    return config


def _set_compute_capabilities(config: Any, tensorrt: TensorRt, wanted: tuple[str, ...]) -> None:
    if not wanted:
        return
    _require(
        hasattr(config, "set_compute_capability"),
        f"compute_capability: {tensorrt.flavour} builds for the GPU of this machine; leave the option out.",
    )
    known = tensorrt.module.ComputeCapability.__members__
    offered = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known if name.startswith("SM"))
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        name = f"SM{capability.replace('.', '')}"
        _require(name in known, f"compute_capability: {capability!r} is none of {offered}.")
        _require(
            config.set_compute_capability(known[name], index),
            f"compute_capability: {tensorrt.flavour} refuses {capability}.",
        )


def _profile(builder: Any, network: Any, spec: PassSpec, dims: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        shapes = [shape_with(tensor.shape, {name: d[i] for name, d in dims.items()}) for i in range(3)]
        profile.set_shape(tensor.name, *shapes)
    _require(bool(profile), f"profile {dims}: refused for the {network.num_inputs} inputs of the network.")
    return profile


def _attach_timing_cache(config: Any, tensorrt: TensorRt, path: Path | None) -> Any:
    if path is None or tensorrt.flavour != "tensorrt":
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _require(condition: object, message: str) -> None:
    if not condition:
        raise EngineError(message)
