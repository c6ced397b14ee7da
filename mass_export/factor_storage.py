"""How an artifact's tensors lie in its file: bases of tasks in fewer bits, deltas of conv1 as factors.

`encode` turns the artifact's tensors into those of the file, `decode` back into float32; the names tell what was
done, so that a file needs no further description:

    <name>                     float32, float16 or bfloat16
    <name>, <name>.scale       int8 and float32: one scale for each column of u, or row of any other matrix
    <name>.u, .s, .vh          instead of a conv1 `<name>`: factors of [D, 3 * P * P]
    merged.<parameter>.delta   instead of merged.<parameter>: what is added to base.<parameter>
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mass_export.checks import require_choice
from mass_export.errors import ArtifactError
from mass_export.low_rank import factorize
from mass_export.spec import PatchEmbed

FactorDtype = Literal["float32", "float16", "bfloat16", "int8"]

_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float16}
_BASIS = re.compile(r"tasks\.[^.]+\..+\.(?P<part>u|vh)")
_DELTA = re.compile(r"tasks\.[^.]+\..+\.delta|router\.[^.]+\..+\.vh|merged\..+\.delta")
_PATCH = re.compile(r"tasks\.[^.]+\.conv1\.weight\.delta")
_PATCH_FACTOR = re.compile(r"(?P<name>tasks\.[^.]+\.conv1\.weight\.delta)\.s")
_SCALE = re.compile(r"(?P<name>(?:tasks\.[^.]+\..+\.(?:u|vh))|(?:merged\..+\.delta))\.scale")
_INT8_MAX = 127
_PATCH_RANKS = 2  # a convolution's delta has a flatter spectrum than the other matrices'


@dataclass(frozen=True)
class Storage:
    """How to store.

    Attributes:
        factor_dtype: of the tasks' bases, and of what the first pass adds to the base's matrices. What else belongs
            to a task is stored in the 16-bit type (float16 beside int8). Singular values, heads and the base stay
            float32.
        patch_embed: `low_rank` stores the deltas of conv1 as factors, of twice the largest rank of the task's matrices.
    """

    factor_dtype: FactorDtype = "float32"
    patch_embed: PatchEmbed = "full"

    def __post_init__(self) -> None:
        require_choice("factor_dtype", self.factor_dtype, FactorDtype)
        require_choice("patch_embed", self.patch_embed, PatchEmbed)


def encode(tensors: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """Tensors of an artifact -> tensors of its file."""
    stored = dict(tensors)
    if storage.patch_embed == "low_rank":
        for name in [name for name in stored if _PATCH.fullmatch(name)]:
            stored |= _patch_factors(name, stored.pop(name), patch_rank(_ranks(name, tensors)))
    if storage.factor_dtype == "float32":
        return stored
    half = _HALF[storage.factor_dtype]
    for name in [name for name in stored if name.startswith("merged.")]:
        merged = stored.pop(name)
        stored[f"{name}.delta"] = (merged.double() - tensors[f"base.{name[7:]}"].double()).float()
    for name, tensor in list(stored.items()):
        basis = _BASIS.fullmatch(name)
        wide = basis and ".conv1." not in name
        if storage.factor_dtype == "int8" and (wide or (name.startswith("merged.") and tensor.ndim == 2)):
            stored[name], stored[f"{name}.scale"] = _quantized(tensor.float(), _axis(name))
        elif basis or _DELTA.fullmatch(name):
            stored[name] = _to_half(name, tensor, half)
    return stored


def decode(stored: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of a file -> tensors of the artifact, the encoded ones as float32.

    Raises:
        ArtifactError: parts of an encoded tensor are missing or do not fit each other.
    """
    tensors = dict(stored)
    try:
        for match in [match for match in map(_SCALE.fullmatch, tensors) if match]:
            _dequantize(tensors, match["name"])
        for match in [match for match in map(_PATCH_FACTOR.fullmatch, tensors) if match]:
            name = match["name"]
            u, s, vh = (tensors.pop(f"{name}.{part}").float() for part in ("u", "s", "vh"))
            tensors[name] = ((u * s) @ vh).reshape(tensors["base.conv1.weight"].shape)
        for name in [name for name in tensors if name.startswith("merged.") and name.endswith(".delta")]:
            parameter = name[len("merged.") : -len(".delta")]
            base = tensors[f"base.{parameter}"]
            delta = tensors.pop(name)
            if delta.shape != base.shape:
                raise ValueError(f"{name} has shape {list(delta.shape)}")  # noqa: TRY301
            tensors[f"merged.{parameter}"] = base.float() + delta.float()
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise ArtifactError(
            f"{where}: encoded tensors do not fit each other ({error}). Copy or merge the artifact again."
        ) from error
    return tensors


def patch_rank(ranks: Iterable[int]) -> int:
    """Rank that the delta of conv1 is kept with, for a task whose matrices have these."""
    return _PATCH_RANKS * max(ranks)


def storage_of(stored: Mapping[str, Tensor]) -> Storage:
    """How the tensors of a file were encoded."""
    dtypes = {tensor.dtype for name, tensor in stored.items() if _BASIS.fullmatch(name)}
    names: dict[torch.dtype, FactorDtype] = {
        torch.int8: "int8",
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
    }
    low_rank = any(_PATCH_FACTOR.fullmatch(name) for name in stored)
    found: list[FactorDtype] = [name for dtype, name in names.items() if dtype in dtypes]
    return Storage(found[0] if found else "float32", "low_rank" if low_rank else "full")


def _axis(name: str) -> int:
    """The axis along which an int8 tensor has one scale: columns of u, rows of all else."""
    return 0 if name.endswith(".u") else 1


def _quantized(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    scale = _rounded_up(tensor.abs().amax(dim=axis) / _INT8_MAX)
    steps = tensor / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(axis)
    return steps.round().to(torch.int8), scale


def _rounded_up(scale: Tensor) -> Tensor:
    """To 17 bits, so that 127 times the scale is exact and a tensor that is read and written again is the same."""
    return ((scale.contiguous().view(torch.int32) + 0x7F) & ~0x7F).view(torch.float32)


def _dequantize(tensors: dict[str, Tensor], name: str) -> None:
    scale, steps = tensors.pop(f"{name}.scale").float(), tensors[name]
    if steps.dtype != torch.int8 or steps.ndim != 2 or scale.ndim != 1:
        raise ValueError(f"{name} is {steps.dtype} {list(steps.shape)}")
    tensors[name] = steps.float() * scale.unsqueeze(_axis(name))


def _patch_factors(name: str, delta: Tensor, rank: int) -> dict[str, Tensor]:
    factors = factorize(delta.double().flatten(1), min(rank, delta.shape[0], delta[0].numel())).to(
        torch.float32
    )
    return {f"{name}.{part}": tensor for part, tensor in vars(factors).items()}


def _ranks(name: str, tensors: Mapping[str, Tensor]) -> list[int]:
    """Of the matrices of the task whose conv1 this is."""
    task = name.removesuffix("conv1.weight.delta")
    return [len(t) for key, t in tensors.items() if key.startswith(task) and key.endswith(".s")]


def _to_half(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    half = tensor.to(dtype)
    if not half.isfinite().all():
        raise ArtifactError(
            f"{name}: values up to {tensor.abs().max():.3g} do not fit float16; use bfloat16."
        )
    return half
