"""Settings of the router: what it reads, and how residuals become one score per task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mass_export.checks import FromMapping, is_int, is_real, require, require_at_least, require_choice
from runtime.bundle import GateMode

Site = Literal["mlp", "attn"]
Sites = Literal["mlp", "attn", "both"]
Token = Literal["cls", "mean"]
Norm = Literal["l2", "l1", "mahalanobis"]
Standardize = Literal["none", "tasks"]
CalibrationLevel = Literal["synthetic", "pool", "task_images"]

SITE_PARAMETER: dict[str, str] = {"mlp": "mlp.c_fc.weight", "attn": "attn.in_proj_weight"}


@dataclass(frozen=True, order=True)
class Tap:
    """A place in the tower that the router reads: the input of a block's attention or of its mlp.

    Attributes:
        layer: block, counted from 0.
        site: `attn` (the output of ln_1) or `mlp` (the output of ln_2). They sort in the order of computation.
    """

    layer: int
    site: Site

    @property
    def parameter(self) -> str:
        """The matrix that reads the tap; its right bases span the task's subspace there."""
        return f"transformer.resblocks.{self.layer}.{SITE_PARAMETER[self.site]}"


@dataclass(frozen=True)
class RouterSettings(FromMapping):
    """The projection router (MASS.md section 3; arXiv 2504.05342, section 4.2), and its extensions.

    With one layer and `standardize: none` the score is the paper's residual. With several taps the residuals are
    averaged over the taps, each standardised over the tasks first with `standardize: tasks`.

    Attributes:
        layer: transformer block whose input is read, counted from 0; None takes 3/4 of the depth
            (9 of 12, 20 of 24).
        site: `mlp` reads the output of ln_2 against the bases of mlp.c_fc.weight, `attn` the output of ln_1
            against those of attn.in_proj_weight, `both` reads both.
        token: the CLS token or the mean over all tokens.
        norm: of the projection residual.
        mode: `topk`, `top1` or `weighted` gates.
        threshold: a task is kept when its gate is greater, in [0, 1).
        temperature: divides the (standardised) residuals before the softmax, > 0.
        max_tasks: cap of `topk`, >= 1.
        rank: rank of the router's bases; None takes that of the task vectors.
        layers: several blocks instead of one `layer`.
        standardize: `tasks` turns each tap's residuals into z-scores over the tasks, sample by sample, so that
            no tap dominates the sum.
        evidence: weight of the heads' evidence on the first pass' own feature, standardised over tasks like a
            tap; 0 leaves it out. The first pass then runs to its end. `auto`: 2 if the heads pass the test of
            `mass_export.head_evidence`, which needs no image, else 0; decided by the merge.
        verify_margin: two best tasks whose scores differ by less are both run, and their heads decide; 0 is off.
        verify_budget: at most this share of a batch is verified, those with the smallest margins, in [0, 1].
        verify_prior: weight of the score difference against the heads' confidence in that decision, >= 0.
    """

    layer: int | None = None
    site: Sites = "mlp"
    token: Token = "cls"
    norm: Norm = "l2"
    mode: GateMode = "topk"
    threshold: float = 0.2
    temperature: float = 1.0
    max_tasks: int = 3
    rank: int | None = None
    layers: tuple[int, ...] | None = None
    standardize: Standardize = "none"
    evidence: float | Literal["auto"] = 0.0
    verify_margin: float = 0.0
    verify_budget: float = 1.0
    verify_prior: float = 1.0

    def __post_init__(self) -> None:
        require_at_least("router.layer", self.layer, 0, optional=True)
        require(
            self.verify_margin == 0 or self.mode == "top1",
            "router.verify_margin: needs mode top1; sets of several tasks hedge already.",
        )
        if self.layers is not None:
            self._check_layers()
        require_choice("router.site", self.site, Sites)
        require_choice("router.standardize", self.standardize, Standardize)
        for name in ("evidence", "verify_margin", "verify_budget", "verify_prior"):
            value = getattr(self, name)
            if name == "evidence" and value == "auto":
                continue
            bound = 1 if name == "verify_budget" else float("inf")
            require(
                is_real(value) and 0 <= value <= bound,
                f"router.{name}: expected a number in [0, {bound}], got {value!r}.",
            )
        require_choice("router.token", self.token, Token)
        require_choice("router.norm", self.norm, Norm)
        require_choice("router.mode", self.mode, GateMode)
        require(
            is_real(self.threshold) and 0 <= self.threshold < 1,
            f"router.threshold: expected a number in [0, 1), got {self.threshold!r}.",
        )
        require(
            is_real(self.temperature) and self.temperature > 0,
            f"router.temperature: expected a number > 0, got {self.temperature!r}.",
        )
        require_at_least("router.max_tasks", self.max_tasks, 1)
        require_at_least("router.rank", self.rank, 1, optional=True)

    def _check_layers(self) -> None:
        given = self.layers
        ok = isinstance(given, list | tuple) and all(is_int(i) and i >= 0 for i in given)
        require(ok and bool(given), f"router.layers: expected a list of block numbers, got {given!r}.")
        require(self.layer is None, "router: give either layer or layers.")
        assert given is not None
        object.__setattr__(self, "layers", tuple(sorted(set(given))))

    def taps(self, depth: int) -> tuple[Tap, ...]:
        """The places that are read, in the order of computation; `depth` is the tower's number of blocks."""
        layer = default_routing_layer(depth) if self.layer is None else self.layer
        layers = (layer,) if self.layers is None else self.layers
        sites: tuple[Site, ...] = ("attn", "mlp") if self.site == "both" else (self.site,)
        return tuple(Tap(i, site) for i in layers for site in sites)


# Spelt out: defaults may move on, the paper does not (arXiv 2504.05342, section 4.2).
PAPER_ROUTER = RouterSettings(
    site="mlp",
    token="cls",  # noqa: S106
    norm="l2",
    mode="topk",
    threshold=0.2,
    temperature=1.0,
    max_tasks=3,
)


def default_router(depth: int, rank: int | None = None) -> RouterSettings:
    """The router of a recipe that names none: every mlp input, standardised, with what the heads know; no image.

    Args:
        depth: number of blocks of the tower.
        rank: of its bases; half of the adaptation's is good.
    """
    return RouterSettings(
        layers=tuple(range(depth)), site="mlp", standardize="tasks", mode="top1", evidence="auto", rank=rank
    )


def default_routing_layer(layers: int) -> int:
    """Three quarters of the depth: 9 of 12, 20 of 24 (the paper's choices; 18 would be 3/4 of 24)."""
    return {12: 9, 24: 20}.get(layers, (layers * 3) // 4)


@dataclass(frozen=True)
class CalibrationInfo(FromMapping):
    """What images taught the router, and how it is used; the numbers themselves are tensors of the artifact.

    Attributes:
        level: `synthetic` images, an unlabelled `pool`, or `task_images` with known tasks.
        images: number of images, in all or by task.
        discriminant: taps whose features, one after the other, the linear discriminant reads; none without one.
        residual_weight: weight of the standardised residuals in the score, >= 0.
        discriminant_weight: weight of the discriminant's log posterior, >= 0.
        sources: names of folders and files, for the record.
        router: the settings that the calibration started from; it may have replaced some.
        unknown: tap whose feature is compared with those of the images; None compares with none.
        unknown_threshold: images at a greater distance are unknown.
        stops: blocks before which an image may stop, ascending: a discriminant reads the mlp inputs up to theirs.
        stop_margin: of the log posterior; an image stops where its best task leads by it.
        confidence_scale: of the score in the route's confidence, fitted to the images; None without their tasks.
    """

    level: CalibrationLevel
    images: dict[str, int]
    discriminant: tuple[Tap, ...] = ()
    residual_weight: float = 1.0
    discriminant_weight: float = 0.0
    sources: dict[str, Any] | None = None
    router: RouterSettings | None = None
    unknown: Tap | None = None
    unknown_threshold: float | None = None
    stops: tuple[int, ...] = ()
    stop_margin: float = 0.0
    confidence_scale: float | None = None

    def __post_init__(self) -> None:
        scale = self.confidence_scale
        require(
            scale is None or (is_real(scale) and scale > 0),
            f"calibration.confidence_scale: expected a number > 0, got {scale!r}.",
        )
        if isinstance(self.unknown, dict):
            object.__setattr__(self, "unknown", Tap(**self.unknown))
        value = self.unknown_threshold
        require(
            value is None or (is_real(value) and value >= 0),
            f"calibration.unknown_threshold: expected a number >= 0, got {value!r}.",
        )
        if isinstance(self.router, dict):
            object.__setattr__(
                self, "router", RouterSettings.from_mapping(self.router, "calibration", "router")
            )
        require_choice("calibration.level", self.level, CalibrationLevel)
        taps = tuple(Tap(**tap) if isinstance(tap, dict) else tap for tap in self.discriminant)
        object.__setattr__(self, "discriminant", taps)
        object.__setattr__(self, "stops", tuple(self.stops))
        ok = all(is_int(stop) and self.taps_before(stop) for stop in self.stops) and list(
            self.stops
        ) == sorted(set(self.stops))
        require(
            ok,
            f"calibration.stops: expected ascending blocks that the discriminant reads, got {self.stops!r}.",
        )
        require(
            is_real(self.stop_margin) and self.stop_margin >= 0,
            f"calibration.stop_margin: expected a number >= 0, got {self.stop_margin!r}.",
        )
        for name in ("residual_weight", "discriminant_weight"):
            value = getattr(self, name)
            require(
                is_real(value) and value >= 0, f"calibration.{name}: expected a number >= 0, got {value!r}."
            )

    def taps_before(self, stop: int) -> tuple[Tap, ...]:
        """What the discriminant of an early stop reads; nothing if it is no block of the last one's."""
        read = tuple(tap for tap in self.discriminant if tap.layer <= stop)
        return read if read and read[-1].layer == stop and len(read) < len(self.discriminant) else ()
