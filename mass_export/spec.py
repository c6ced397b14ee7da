"""Frozen, validated settings: the vision tower, the merge, the router. Plain data, no torch.

Every settings class checks itself when it is made; `from_mapping` builds one from parsed YAML or JSON and
refuses unknown keys by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from mass_export.errors import ModelConfigError, RecipeError
from runtime.bundle import Compose, GateMode, HeadChoice, PreprocessSpec

BaseMerge = Literal["tsvm", "isotropic", "mean", "zeroshot"]
Site = Literal["mlp", "attn"]
Token = Literal["cls", "mean"]
Norm = Literal["l2", "l1", "mahalanobis"]
VectorMerge = Literal["mean", "base"]
SumWeights = Literal["uniform", "gates"]
Activation = Literal["gelu", "quick_gelu"]

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def require(condition: bool, message: str) -> None:  # noqa: FBT001
    """Raise RecipeError with `message` unless `condition`."""
    if not condition:
        raise RecipeError(message)


def require_choice(name: str, value: object, literal: Any) -> None:
    """Raise RecipeError unless `value` is one of the Literal's values."""
    choices = get_args(literal)
    require(value in choices, f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}.")


def is_int(value: object) -> bool:
    """True for integers proper, not for booleans."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """True for finite int or float, not for booleans."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _FromMapping:
    """Build a frozen dataclass from a parsed mapping, refusing unknown keys."""

    @classmethod
    def from_mapping(cls, data: object, where: str) -> Self:
        """Make the settings from parsed YAML or JSON; `where` is named in errors.

        Raises:
            RecipeError: not a mapping, an unknown key, or an invalid value.
        """
        require(isinstance(data, Mapping), f"{where}: expected a mapping, got {data!r}.")
        assert isinstance(data, Mapping)
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(str(key) for key in data if key not in known)
        require(not unknown, f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}.")
        try:
            return cls(**data)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        except TypeError as error:
            raise RecipeError(f"{where}: {error}.") from error


@dataclass(frozen=True)
class RouterSettings(_FromMapping):
    """The projection router (MASS.md section 3; arXiv 2504.05342, section 4.2).

    Attributes:
        layer: transformer block whose input is read, counted from 0; None takes 3/4 of the depth
            (9 of 12, 20 of 24).
        site: `mlp` reads the output of ln_2 against the bases of mlp.c_fc.weight, `attn` the output of ln_1
            against those of attn.in_proj_weight.
        token: the CLS token or the mean over all tokens.
        norm: of the projection residual.
        mode: `topk`, `top1` or `weighted` gates.
        threshold: a task is kept when its gate is greater, in [0, 1).
        temperature: divides the (standardised) residuals before the softmax, > 0.
        max_tasks: cap of `topk`, >= 1.
        rank: rank of the router's bases; None takes that of the task vectors.
    """

    layer: int | None = None
    site: Site = "mlp"
    token: Token = "cls"
    norm: Norm = "l2"
    mode: GateMode = "topk"
    threshold: float = 0.2
    temperature: float = 1.0
    max_tasks: int = 3
    rank: int | None = None

    def __post_init__(self) -> None:
        require(self.layer is None or (is_int(self.layer) and self.layer >= 0), f"router.layer: expected a block number >= 0, got {self.layer!r}.")
        require_choice("router.site", self.site, Site)
        require_choice("router.token", self.token, Token)
        require_choice("router.norm", self.norm, Norm)
        require_choice("router.mode", self.mode, GateMode)
        require(is_real(self.threshold) and 0 <= self.threshold < 1, f"router.threshold: expected a number in [0, 1), got {self.threshold!r}.")
        require(is_real(self.temperature) and self.temperature > 0, f"router.temperature: expected a number > 0, got {self.temperature!r}.")
        require(is_int(self.max_tasks) and self.max_tasks >= 1, f"router.max_tasks: expected an integer >= 1, got {self.max_tasks!r}.")
        require(self.rank is None or (is_int(self.rank) and self.rank >= 1), f"router.rank: expected an integer >= 1, got {self.rank!r}.")


def default_routing_layer(layers: int) -> int:
    """Three quarters of the depth: 9 of 12, 20 of 24 (the paper's choices; 18 would be 3/4 of 24)."""
    return {12: 9, 24: 20}.get(layers, (layers * 3) // 4)


@dataclass(frozen=True)
class MergeSettings:
    """How task vectors are factorised and merged (MASS.md sections 1, 2, 4, 5).

    Attributes:
        rank_ratio: share of min(D_out, D_in) that is kept of every matrix, in (0, 1]; per task in `Recipe`.
        rank: a fixed rank instead of the ratio.
        base_merge: the first pass: `tsvm`, `isotropic`, `mean`, `zeroshot`; or `file`, a merged checkpoint.
        compose: matrices of the second pass for sets of several tasks: `tsvm` or `sum`.
        sum_weights: weights of `compose: sum`, uniform (the sum) or the gates of the set.
        vectors: vector parameters of the second pass: mean of the set's deltas, or the base's.
        head_choice: the head that answers: the largest `max` or `mean` logit.
    """

    base_merge: BaseMerge | Literal["file"] = "tsvm"
    compose: Compose = "tsvm"
    sum_weights: SumWeights = "uniform"
    vectors: VectorMerge = "mean"
    head_choice: HeadChoice = "max"

    def __post_init__(self) -> None:
        if self.base_merge != "file":
            require_choice("base_merge", self.base_merge, BaseMerge)
        require_choice("compose", self.compose, Compose)
        require_choice("sum_weights", self.sum_weights, SumWeights)
        require_choice("vectors", self.vectors, VectorMerge)
        require_choice("head_choice", self.head_choice, HeadChoice)


@dataclass(frozen=True)
class TaskInfo:
    """Name and classes of a task."""

    name: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        require(bool(TASK_NAME.fullmatch(self.name)), f"task name {self.name!r}: use letters, digits, - and _, at most 64.")
        require(len(self.classes) > 0, f"task {self.name}: its class list is empty.")
        require(len(set(self.classes)) == len(self.classes), f"task {self.name}: class names repeat.")


@dataclass(frozen=True)
class VisionSpec:
    """A plain ViT vision tower in open_clip's terms.

    Attributes:
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels.
        width: D.
        layers: number of residual blocks.
        heads: attention heads.
        mlp_width: hidden width of the MLP.
        embed_dim: width of the image feature.
        activation: GELU, or QuickGELU as in OpenAI's CLIP.
        layer_norm_eps: epsilon of every LayerNorm.
        ln_pre: whether a LayerNorm precedes the blocks.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    layers: int
    heads: int
    mlp_width: int
    embed_dim: int
    activation: Activation = "gelu"
    layer_norm_eps: float = 1e-5
    ln_pre: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def tokens(self) -> int:
        """N: patches and CLS."""
        return self.grid[0] * self.grid[1] + 1

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VisionSpec:
        """Inverse of `dataclasses.asdict` after a trip through JSON."""
        pairs = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        try:
            return cls(**pairs)
        except TypeError as error:
            raise ModelConfigError(f"vision spec: {error}.") from error

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names (without `visual.`) and shapes of every parameter, in open_clip's order."""
        d, m = self.width, self.mlp_width
        shapes: dict[str, tuple[int, ...]] = {
            "class_embedding": (d,),
            "positional_embedding": (self.tokens, d),
            "proj": (d, self.embed_dim),
            "conv1.weight": (d, 3, *self.patch_size),
        }
        if self.ln_pre:
            shapes |= {"ln_pre.weight": (d,), "ln_pre.bias": (d,)}
        for i in range(self.layers):
            block = f"transformer.resblocks.{i}."
            shapes |= {
                f"{block}ln_1.weight": (d,), f"{block}ln_1.bias": (d,),
                f"{block}attn.in_proj_weight": (3 * d, d), f"{block}attn.in_proj_bias": (3 * d,),
                f"{block}attn.out_proj.weight": (d, d), f"{block}attn.out_proj.bias": (d,),
                f"{block}ln_2.weight": (d,), f"{block}ln_2.bias": (d,),
                f"{block}mlp.c_fc.weight": (m, d), f"{block}mlp.c_fc.bias": (m,),
                f"{block}mlp.c_proj.weight": (d, m), f"{block}mlp.c_proj.bias": (d,),
            }
        return shapes | {"ln_post.weight": (d,), "ln_post.bias": (d,)}

    def matrix_names(self) -> list[str]:
        """The 2-D parameters, which are factorised; all others are vector parameters."""
        return [name for name, shape in self.parameter_shapes().items() if len(shape) == 2]


# open_clip vision settings that are fine at these values and refused at any other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "ls_init_value": (None,), "attentional_pool": (False,), "timm_model_name": (None,), "pool_type": ("tok",),
    "final_ln_after_pool": (False,), "pos_embed_type": ("learnable",), "no_ln_pre": (False, True), "output_tokens": (False,),
    "norm_kwargs": (None, {}), "act_kwargs": (None, {}), "block_type": (None, "default"), "qk_norm": (False,), "input_patchnorm": (False,),
    "scaled_cosine_attn": (False,), "scale_heads": (False,), "scale_attn_inner": (False,), "scale_attn": (False,), "scale_fc": (False,),
}
_TRAINING_ONLY = {"patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "timm_pool", "timm_proj", "timm_proj_bias",
                  "attn_pooler_queries", "attn_pooler_heads"}


def vision_spec_from_config(config: Mapping[str, Any], where: str) -> VisionSpec:
    """Read open_clip's model config (`embed_dim`, `vision_cfg`, `quick_gelu`, ..).

    Raises:
        ModelConfigError: something is missing, or a setting is not that of a plain ViT; it is named.
    """
    vision = config.get("vision_cfg")
    if not isinstance(vision, Mapping) or not is_int(config.get("embed_dim")):
        raise ModelConfigError(f"{where}: not an open_clip model config (needs embed_dim and vision_cfg).")
    known = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", *_NEUTRAL, *_TRAINING_ONLY}
    refused = [f"{key}={vision[key]!r}" for key, neutral in _NEUTRAL.items() if key in vision and vision[key] not in neutral]
    refused += [f"{key}={value!r}" for key, value in vision.items() if key not in known]
    if isinstance(vision.get("layers"), list | tuple):
        refused.append(f"layers={vision['layers']!r} (a ResNet)")
    if refused:
        raise ModelConfigError(f"{where}: unsupported vision_cfg settings: {', '.join(refused)}. Plain ViT towers with a CLS token are supported.")
    try:
        width, layers = int(vision.get("width", 768)), int(vision.get("layers", 12))
        image_size, patch_size = _pair(vision.get("image_size", 224)), _pair(vision.get("patch_size", 16))
        head_width, mlp_ratio = int(vision.get("head_width", 64)), float(vision.get("mlp_ratio", 4.0))
    except (TypeError, ValueError) as error:
        raise ModelConfigError(f"{where}: vision_cfg: {error}.") from error
    if min(width, layers, head_width, *image_size, *patch_size) < 1 or width % head_width:
        raise ModelConfigError(f"{where}: vision_cfg: sizes must be positive and width a multiple of head_width.")
    return VisionSpec(
        image_size=image_size, patch_size=patch_size, width=width, layers=layers, heads=width // head_width,
        mlp_width=int(width * mlp_ratio), embed_dim=int(config["embed_dim"]),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu", ln_pre=not vision.get("no_ln_pre", False),
    )


def preprocess_spec_from_config(config: Mapping[str, Any] | None, image_size: tuple[int, int], where: str) -> PreprocessSpec:
    """Read open_clip's `preprocess_cfg`; absent keys take open_clip's defaults (OpenAI's mean and std)."""
    config = dict(config or {})
    mean, std = tuple(config.pop("mean", OPENAI_MEAN)), tuple(config.pop("std", OPENAI_STD))
    interpolation, resize_mode = config.pop("interpolation", "bicubic"), config.pop("resize_mode", "shortest")
    for ignored in ("size", "mode", "fill_color"):  # the size is the tower's; mode is RGB; fill only pads
        config.pop(ignored, None)
    if config or interpolation not in ("bicubic", "bilinear") or resize_mode not in ("shortest", "squash"):
        raise ModelConfigError(
            f"{where}: unsupported preprocess_cfg: interpolation {interpolation!r}, resize_mode {resize_mode!r}, other keys {sorted(config)}."
        )
    if len(mean) != 3 or len(std) != 3 or not all(map(is_real, (*mean, *std))) or min(std) <= 0:
        raise ModelConfigError(f"{where}: preprocess_cfg: mean and std must be three numbers each, std > 0.")
    return PreprocessSpec(image_size=image_size, mean=mean, std=std, interpolation=interpolation, resize_mode=resize_mode)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, list | tuple):
        high, wide = value
        return int(high), int(wide)
    return int(value), int(value)


def rank_of(shape: tuple[int, ...], rank_ratio: float | None, rank: int | None) -> int:
    """Kept rank of a matrix: `rank`, or max(1, int(min(D_out, D_in) * rank_ratio)) (MASS.md section 1)."""
    full = min(shape)
    if rank is not None:
        return min(rank, full)
    assert rank_ratio is not None
    return max(1, int(full * rank_ratio))


@dataclass(frozen=True)
class ArtifactInfo:
    """The JSON header of an artifact: everything but the tensors."""

    vision: VisionSpec
    preprocess: PreprocessSpec
    tasks: tuple[TaskInfo, ...]
    merge: MergeSettings
    router: RouterSettings
    rank_ratios: tuple[float | None, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
