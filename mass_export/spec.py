"""Frozen, validated settings: the vision tower, the merge, the router. Plain data, no torch.

Every settings class checks itself when it is made; `from_mapping` builds one from parsed YAML or JSON and
refuses unknown keys by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mass_export.checks import is_int, is_real, require, require_choice
from mass_export.errors import ModelConfigError
from mass_export.router_spec import CalibrationInfo, RouterSettings, Tap
from runtime.bundle import Compose, HeadChoice, PreprocessSpec

BaseMerge = Literal["tsvm", "isotropic", "mean", "zeroshot"]
VectorMerge = Literal["mean", "base"]
SumWeights = Literal["uniform", "gates"]
Activation = Literal["gelu", "quick_gelu"]
PatchEmbed = Literal["full", "low_rank"]

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class MergeSettings:
    """How task vectors are factorised and merged (MASS.md sections 1, 2, 4, 5).

    Attributes:
        base_merge: the first pass: `tsvm`, `isotropic`, `mean`, `zeroshot`; or `file`, a merged checkpoint.
        compose: matrices of the second pass for sets of several tasks: `tsvm` or `sum`.
        sum_weights: weights of `compose: sum`, uniform (the mean, 1/K each) or the gates of the set.
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
        require(
            isinstance(self.name, str) and bool(TASK_NAME.fullmatch(self.name)),
            f"task name {self.name!r}: use letters, digits, - and _, at most 64, a letter or digit first.",
        )
        require(len(self.classes) > 0, f"task {self.name}: its class list is empty.")
        repeated = sorted(name for name, count in Counter(self.classes).items() if count > 1)
        require(not repeated, f"task {self.name}: class names repeat: {', '.join(map(repr, repeated))}.")


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

    def __post_init__(self) -> None:
        pairs = {"image_size": self.image_size, "patch_size": self.patch_size}
        for name, pair in pairs.items():
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(is_int(n) and n >= 1 for n in pair)):
                raise ModelConfigError(f"{name}: expected two integers >= 1, got {pair!r}.")
        for name in ("width", "layers", "heads", "mlp_width", "embed_dim"):
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise ModelConfigError(f"{name}: expected an integer >= 1, got {value!r}.")
        if self.width % self.heads:
            raise ModelConfigError(f"width {self.width} is not a multiple of {self.heads} heads.")
        if min(self.grid) < 1:
            raise ModelConfigError(f"patch_size {self.patch_size} exceeds image_size {self.image_size}.")
        if self.activation not in get_args(Activation) or not isinstance(self.ln_pre, bool):
            raise ModelConfigError(f"activation {self.activation!r} or ln_pre {self.ln_pre!r} is invalid.")
        if not is_real(self.layer_norm_eps) or self.layer_norm_eps <= 0:
            raise ModelConfigError(f"layer_norm_eps: expected a number > 0, got {self.layer_norm_eps!r}.")

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
        pairs: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
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
                f"{block}ln_1.weight": (d,),
                f"{block}ln_1.bias": (d,),
                f"{block}attn.in_proj_weight": (3 * d, d),
                f"{block}attn.in_proj_bias": (3 * d,),
                f"{block}attn.out_proj.weight": (d, d),
                f"{block}attn.out_proj.bias": (d,),
                f"{block}ln_2.weight": (d,),
                f"{block}ln_2.bias": (d,),
                f"{block}mlp.c_fc.weight": (m, d),
                f"{block}mlp.c_fc.bias": (m,),
                f"{block}mlp.c_proj.weight": (d, m),
                f"{block}mlp.c_proj.bias": (d,),
            }
        return shapes | {"ln_post.weight": (d,), "ln_post.bias": (d,)}

    def matrix_names(self) -> list[str]:
        """The 2-D parameters, which are factorised; all others are vector parameters."""
        return [name for name, shape in self.parameter_shapes().items() if len(shape) == 2]


def rank_of(shape: tuple[int, ...], rank_ratio: float | None, rank: int | None) -> int:
    """Kept rank of a matrix: `rank`, or max(1, int(min(D_out, D_in) * rank_ratio)) (MASS.md section 1)."""
    full = min(shape)
    if rank is not None:
        return min(rank, full)
    assert rank_ratio is not None
    return max(1, int(full * rank_ratio))


@dataclass(frozen=True)
class ArtifactInfo:
    """The JSON header of an artifact: everything but the tensors.

    Attributes:
        rank_ratios: share of min(D_out, D_in) kept of each task's matrices; None where `ranks` fixes it.
        ranks: fixed rank of each task's matrices, or None; empty when no task has one.
        provenance: name and sha256 of every input.
        model_config: the model's config in open_clip's form.
        calibration: what images taught the router, if any.
    """

    vision: VisionSpec
    preprocess: PreprocessSpec
    tasks: tuple[TaskInfo, ...]
    merge: MergeSettings
    router: RouterSettings
    rank_ratios: tuple[float | None, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int | None, ...] = ()
    model_config: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationInfo | None = None

    def taps(self) -> tuple[Tap, ...]:
        """The taps with router bases, in the order of computation."""
        return self.router.taps(self.vision.layers)

    def read_taps(self) -> tuple[Tap, ...]:
        """The taps that the first pass must compute: those whose residuals count, and the discriminant's."""
        calibration = self.calibration
        taps = set() if calibration is not None and calibration.residual_weight == 0 else set(self.taps())
        if calibration is not None:
            taps.update(calibration.discriminant)
            if calibration.unknown is not None:
                taps.add(calibration.unknown)
        return tuple(sorted(taps))

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        require(
            bool(names) and len(set(names)) == len(names), f"tasks: expected distinct names, got {names}."
        )
        require(len(self.rank_ratios) == len(names), "rank_ratios: expected one per task.")
        require(len(self.ranks) in (0, len(names)), "ranks: expected none, or one per task.")
        depth = self.vision.layers
        for tap in {*self.taps(), *self.read_taps()}:
            require(tap.layer < depth, f"router: expected layers 0 to {depth - 1}, got {tap.layer}.")
