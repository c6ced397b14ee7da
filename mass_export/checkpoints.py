"""Checkpoint files -> the parameters of the vision tower, complete and checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mass_export.checkpoint_folder import open_checkpoint
from mass_export.errors import (
    CheckpointFormatError,
    CheckpointKeyError,
    CheckpointShapeError,
    CheckpointValueError,
    shortened,
)
from mass_export.hf_layout import PROJECTION, HuggingFaceLayout, check_config, open_clip_layout
from mass_export.spec import VisionSpec

# What training code puts before a name: DataParallel, torch.compile, CLIP classes, image encoders.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|model|image_encoder|encoder)\.)*(?:visual\.)?")
# Parameters that every tower has and no text tower does; they show where the tower is.
_ANCHORS = ("class_embedding", "conv1.weight", "proj", "ln_post.weight", "ln_post.bias")
# LayerScale multiplies what a branch adds to the residual stream, and is multiplied into the branch's last layer.
_LAYER_SCALE = re.compile(r"(transformer\.resblocks\.\d+\.)ls_([12])\.gamma")
_SCALED = {"1": "attn.out_proj", "2": "mlp.c_proj"}
# What a full CLIP checkpoint holds besides its vision tower ..
_TEXT = re.compile(
    r"text_projection(\..+)?|logit_scale|logit_bias|token_embedding\..+|ln_final\..+|attn_mask|text\..+"
    r"|input_resolution|context_length|vocab_size|classification_head\..+|text_decoder\..+"
)
# .. and names that both towers use, which are text only where the vision tower has a prefix of its own.
_TEXT_TOWER = re.compile(r"transformer\..+|positional_embedding")


def load_checkpoint(
    path: Path, vision: VisionSpec, *, allow_pickle: bool = False, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Load a vision tower into memory; otherwise as `open_parameters`."""
    return dict(open_parameters(path, vision, allow_pickle=allow_pickle, base=base))


def open_parameters(
    path: Path, vision: VisionSpec, *, allow_pickle: bool = False, base: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor]:
    """Open a vision tower, alone or of a whole CLIP, from a file or a folder in open_clip's or Hugging Face's layout.

    The prefixes `visual.`, `model.visual.`, `module.visual.`, `image_encoder.model.visual.` and the like are
    stripped, and a text tower is left out. A tower with LayerScale becomes the plain tower that computes the same:
    `x + gamma (W h + b)` is `x + (diag(gamma) W) h + gamma b`.

    Args:
        path: safetensors, a torch state dict, TorchScript, an index of shards, or a folder with one of them.
        vision: what the tower must be.
        allow_pickle: also take the parameters of pickled modules.
        base: parameters of the base. A Hugging Face `CLIPVisionModel` has no projection and cannot have changed
            it: it takes the base's.

    Returns:
        the parameters of `vision.parameter_shapes()`, in that order, float32 on the CPU, all finite. Each is converted
        when it is asked for, and until then lies in the file where the format can be mapped.

    Raises:
        CheckpointFormatError: the file cannot be read.
        CheckpointKeyError: tensors are missing or unexpected.
        CheckpointShapeError: tensors have other shapes than the model's.
        CheckpointValueError: tensors are not floating point, or hold NaN or infinity.
        ModelConfigError: a folder's config.json contradicts `vision`.
    """
    where = str(path)
    tensors = open_clip_layout(open_checkpoint(path, allow_pickle=allow_pickle), where)
    if isinstance(tensors, HuggingFaceLayout):
        if path.is_dir():
            check_config(path, vision)
        if PROJECTION not in tensors:
            if base is None:
                raise CheckpointFormatError(
                    f"{where}: a vision model without its projection (visual_projection.weight), which only a "
                    "fine-tuned checkpoint may lack; give the CLIPModel or CLIPVisionModelWithProjection."
                )
            tensors = dict(tensors) | {PROJECTION: base["proj"]}
    shapes = vision.parameter_shapes()
    prefix = _tower_prefix(tensors, where)
    tower = {
        name[len(prefix) :]: name
        for name in tensors
        if name.startswith(prefix) and not _is_text(name, prefix)
    }
    elsewhere = [name for name in tensors if not name.startswith(prefix) and not _is_text(name, prefix)]
    if any(_LAYER_SCALE.fullmatch(name) for name in tower):
        shapes = shapes | _layer_scale_shapes(vision)
    missing = [prefix + name for name in shapes if name not in tower]
    unexpected = [stored for name, stored in tower.items() if name not in shapes] + elsewhere
    if missing or unexpected:
        raise CheckpointKeyError(where, missing, unexpected)
    found = {name: tensors[tower[name]] for name in shapes}
    _check_shapes(found, shapes, where)
    check_values(found, where)
    parameters = _Float32(found)
    return parameters if shapes == vision.parameter_shapes() else _without_layer_scale(dict(parameters))


def _layer_scale_shapes(vision: VisionSpec) -> dict[str, tuple[int, ...]]:
    return {
        f"transformer.resblocks.{layer}.ls_{branch}.gamma": (vision.width,)
        for layer in range(vision.layers)
        for branch in _SCALED
    }


def _without_layer_scale(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    for match in [match for match in map(_LAYER_SCALE.fullmatch, parameters) if match]:
        gamma, layer = parameters.pop(match.string), match[1] + _SCALED[match[2]]
        parameters[f"{layer}.weight"] *= gamma[:, None]
        parameters[f"{layer}.bias"] *= gamma
    return parameters


def float32_parameters(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Copy to contiguous float32 in fresh memory: results then depend on values, not on a file's layout.

    Raises:
        CheckpointValueError: naming every tensor that is not floating point or not finite.
    """
    check_values(tensors, where)
    return dict(_Float32(tensors))


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Look at every tensor, one at a time, and keep none.

    Raises:
        CheckpointValueError: naming every tensor that is not floating point, or not finite as float32.
    """
    problems = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = (
                "without data" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}".replace("torch.", "")
            )
            problems.append(f"{name} is {kind}, not dense floating point")
            continue
        parameter = tensor.float()
        if not parameter.sum(dtype=torch.float64).isfinite():  # far cheaper than to look at each
            bad = int(parameter.numel() - parameter.isfinite().sum())
            problems.append(f"{name} holds {bad} NaN or infinite value(s)")
    if problems:
        raise CheckpointValueError(
            f"{where}: {len(problems)} unusable tensor(s): {shortened(problems, separator='; ')}. "
            "Finite floating-point values are needed; was it saved before training diverged?"
        )


class _Float32(Mapping[str, Tensor]):
    """Tensors that are copied to contiguous float32 when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _tower_prefix(names: Iterable[str], where: str) -> str:
    """What precedes the tower's names: the prefix under which most anchors are found, "" when none is."""
    counts: dict[str, int] = {}
    for name in names:
        for anchor in _ANCHORS:
            prefix = name.removesuffix(anchor)
            if name.endswith(anchor) and _PREFIX.fullmatch(prefix):
                counts[prefix] = counts.get(prefix, 0) + 1
    best = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    if len(best) > 1:
        towers = ", ".join(f"{prefix}*" for prefix in sorted(best))
        raise CheckpointFormatError(f"{where}: holds several vision towers ({towers}); keep one of them.")
    return best[0] if best else ""


def _is_text(name: str, prefix: str) -> bool:
    """Whether a tensor belongs to the rest of a CLIP whose vision tower has this prefix."""
    if prefix and name.startswith(prefix) and prefix.endswith("visual."):
        return False
    bare = re.sub(r"^(?:(?:module|_orig_mod|model|image_encoder|encoder)\.)+", "", name)
    return bool(_TEXT.fullmatch(bare) or (prefix.endswith("visual.") and _TEXT_TOWER.fullmatch(bare)))


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [(name, shape, got[name]) for name, shape in shapes.items() if got[name] != shape]
    if wrong:
        raise CheckpointShapeError(where, wrong)
