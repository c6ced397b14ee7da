"""How engines are built: checked settings, and the installed TensorRT that they are for."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.bundle import FIRST_PASS, Manifest
from runtime.engine_spec import Flavour, Precision, Profile
from runtime.errors import EngineError

Range = tuple[int, int, int]

PACKAGES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu12"}


@dataclass(frozen=True)
class EngineSettings:
    """What the user asks for.

    Attributes:
        flavour: `tensorrt` builds on the GPU that the engine is for, `tensorrt_rtx` anywhere; None takes what is
            installed, TensorRT first.
        precision: of the matrix products; None is that of the bundle's graphs.
        batch: smallest, best and largest batch.
        slots: the same for the size of the task sets, K; None lets the router's settings decide.
        compute_capability: GPUs to build for, such as `8.6`; TensorRT-RTX alone, none means Ampere and later.
        workspace_mib: limit of a layer's scratch memory; None is TensorRT's own.
        version_compatible: also runs on later versions of the same major one.
        hardware_compatible: TensorRT alone: also runs on later GPU generations, from Ampere on.
        weight_stripped: leaves out the weights; the runtime fills them in from the ONNX files.
        tf32: lets fp32 products round their inputs to TF32.
        optimization_level: 0 to 5, how much build time is spent; None is TensorRT's own.
        calibration_images: int8 alone: folder or file of the images that scales are found on; None is random ones.
    """

    flavour: Flavour | None = None
    precision: Precision | None = None
    batch: Range = (1, 8, 32)
    slots: Range | None = None
    compute_capability: tuple[str, ...] = ()
    workspace_mib: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_stripped: bool = False
    tf32: bool = False
    optimization_level: int | None = None
    calibration_images: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "slots"):
            value: Range | None = getattr(self, name)
            if value is not None and not 1 <= value[0] <= value[1] <= value[2]:
                low, best, high = value
                raise EngineError(f"{name}: expected 1 <= min <= opt <= max, got {low}, {best}, {high}.")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise EngineError(f"workspace_mib: expected at least 1, got {self.workspace_mib}.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineError(f"optimization_level: expected 0 to 5, got {self.optimization_level}.")

    def options(self) -> tuple[str, ...]:
        """Options that differ from the default, for the engine's key."""
        flags = ("version_compatible", "hardware_compatible", "weight_stripped", "tf32")
        values = {name: getattr(self, name) for name in ("workspace_mib", "optimization_level")}
        given = [f"{name}={value}" for name, value in values.items() if value is not None]
        return tuple(sorted([name for name in flags if getattr(self, name)] + given))

    def profiles(self, pass_name: str, manifest: Manifest) -> tuple[Profile, ...]:
        """Optimisation profiles of a pass.

        The second pass has one for a batch that shares a single set (S = 1) and one where each sample brings its
        own (S = B).
        """
        if pass_name == FIRST_PASS:
            return ({"B": self.batch},)
        slots = self.slots or default_slots(manifest)
        if slots[2] > len(manifest.tasks):
            raise EngineError(f"slots: at most {len(manifest.tasks)} tasks in this bundle, got {slots[2]}.")
        shared: Profile = {"B": self.batch, "S": (1, 1, 1), "K": slots}
        own: Profile = {"B": self.batch, "S": self.batch, "K": slots}
        return (shared,) if self.batch[2] == 1 else (shared, own)


def default_slots(manifest: Manifest) -> Range:
    """Set sizes that the router can give: one for top1, up to its cap for topk, any for weighted."""
    router, tasks = manifest.router, len(manifest.tasks)
    largest = {"top1": 1, "topk": min(router.max_tasks, tasks)}.get(router.mode, tasks)
    return (1, 1, largest)


@dataclass(frozen=True)
class TensorRt:
    """An importable TensorRT.

    Attributes:
        flavour: which.
        module: the Python module; both have one API, apart from what `hasattr` is asked about.
        version: of the module.
    """

    flavour: Flavour
    module: Any
    version: str


def find_tensorrt(flavour: Flavour | None) -> TensorRt:
    """Import a flavour, or the first that is installed.

    Raises:
        EngineError: it is not installed, or does not import.
    """
    wanted: tuple[Flavour, ...] = (flavour,) if flavour else ("tensorrt", "tensorrt_rtx")
    for candidate in wanted:
        if importlib.util.find_spec(candidate) is None:
            continue
        try:
            module: ModuleType = importlib.import_module(candidate)
        except (ImportError, OSError) as error:
            raise EngineError(f"{candidate} is installed but does not import ({error}).") from error
        return TensorRt(candidate, module, str(module.__version__))
    packages = " or ".join(f"`pip install {PACKAGES[candidate]}`" for candidate in wanted)
    raise EngineError(
        f"{' and '.join(wanted)}: not installed. {packages}. TensorRT builds on the GPU that the engine is for; "
        "TensorRT-RTX also builds without one."
    )
