"""What a TensorRT engine was built from and for: the part of the manifest that decides whether it may run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Flavour = Literal["tensorrt", "tensorrt_rtx"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Profile = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class EngineKey:
    """Two engines with equal keys are interchangeable; with any difference they are not.

    Attributes:
        graph_sha256: of the ONNX file and its external data.
        flavour: Python module that built the engine and can run it.
        version: of that module.
        compute_capability: GPUs that it runs on, such as `8.6`; none means any that the flavour supports.
        precision: of the matrix products; LayerNorm, softmax and the residual stream are fp32 always.
        profiles: for each optimisation profile, (min, opt, max) of the dimensions B, S and K.
        options: builder options that differ from the default, sorted; of int8 engines also
            `calibration=SOURCE:COUNT:HASH`, the images that scales were found on.
    """

    graph_sha256: str
    flavour: Flavour
    version: str
    compute_capability: tuple[str, ...]
    precision: Precision
    profiles: tuple[Profile, ...]
    options: tuple[str, ...]


@dataclass(frozen=True)
class EngineSpec:
    """An engine of a bundle; size and sha256 stand under the manifest's `files`. In the cache: `file` is absolute."""

    pass_name: str
    file: str
    key: EngineKey


def shape_with(shape: Sequence[int | str], dims: Mapping[str, int]) -> tuple[int, ...]:
    """Put numbers for the letters: `("S", "K*8")` with S = 2, K = 3 is (2, 24)."""
    return tuple(_size(dim, dims) for dim in shape)


def _size(dim: int | str, dims: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    letter, _, factor = dim.partition("*")
    return dims[letter] * int(factor or 1)


def profile_for(profiles: Sequence[Profile], dims: Mapping[str, int]) -> int | None:
    """Index of the first profile that admits the dimensions; None if none does."""
    for index, profile in enumerate(profiles):
        if all(low <= dims[letter] <= high for letter, (low, _, high) in profile.items()):
            return index
    return None


def is_compatible(key: EngineKey, installed: str) -> bool:
    """Whether the installed version runs an engine: its own, or a later one of the major version if it was built so."""
    if installed == key.version or "version_compatible" not in key.options:
        return installed == key.version
    with contextlib.suppress(ValueError):
        ours, built = ([int(part) for part in text.split(".")[:3]] for text in (installed, key.version))
        return ours[0] == built[0] and ours >= built
    return False
