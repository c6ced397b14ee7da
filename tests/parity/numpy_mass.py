"""MASS in plain numpy float64: the yardstick that every other implementation is compared with.

Nothing here is clever. Weights are merged densely, one model per sample set, each merged model runs the
whole network, and every formula stands as it is written in the method. No code is shared with the packages
under test and only numpy is needed. The module has no package around it: load it by its path.

Letters: B batch, T tasks, N tokens, D width, M hidden width, E feature, C classes, R rank, P patch.
A delta is `finetuned - base`; its kept factors are `u [D_out, R]`, `s [R]`, `vh [R, D_in]`.

Where the method leaves a choice open, this file assumes the following (each is a parameter where it matters):

* Parameters are cast to float64 before they are subtracted.
* "Matrix" means exactly two dimensions; class_embedding, conv1, biases and LayerNorm are vector parameters.
* `rank = max(1, int(min(shape) * ratio))`, at most `min(shape)`; `int` truncates the float product.
* Directions whose singular value is at most `null_tolerance` times the largest of the same delta hold no
  information and are arbitrary: they become zero columns of u and zero rows of vh. A task equal to the base
  thus has empty bases, adds nothing to any matrix, and its residual is the norm of the routed feature itself.
* A polar factor drops singular values that are at most `polar_tolerance` (1e-4) times the largest. The same
  checkpoint given twice therefore acts on the matrices as if given once.
* The `isotropic` and `mean` base merges use the full deltas; `merge_fixed(..., truncated=True)` uses the
  truncated ones. The mean singular value of `isotropic` counts every singular value, zeros too, while
  the polar factor drops numerically null directions only (`null_tolerance`).
* Vector parameters get the mean of the deltas in the base merges `tsvm`, `isotropic` and `mean`, and stay
  at the base in `zeroshot`.
* The `mean` token of the router averages all N tokens, the CLS token included.
* For one task the sample std is undefined and is taken as 0; the covariance of one row likewise.
* Gates are returned for all T tasks, not zeroed outside the set. Ties go to the lower task index; a gate
  passes only when it is strictly above the threshold.
* The uniform weight of `compose=sum` is 1 per task (`sum_weights="sum"`); 1/|set| is `"mean"`. Gate weights
  are raw (`"gates"`) or rescaled to sum to 1 over the set (`"gates_normalized"`). Vector parameters always
  use the unweighted mean over the set.
* The `mean` head choice takes the task whose logits have the largest mean over its classes.
* A known task skips the first pass: its residuals are NaN and its gates one-hot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Params = dict[str, Array]

LAYER_NORM_EPS = 1e-5
NORMALIZE_EPS = 1e-12
STD_EPS = 1e-6
COVARIANCE_RIDGE = 1e-3


class Factors(NamedTuple):
    """Truncated thin SVD of the delta of one matrix: `delta ~ u @ diag(s) @ vh`."""

    u: Array  # [D_out, R]
    s: Array  # [R]
    vh: Array  # [R, D_in]

    def dense(self) -> Array:
        """Multiply the factors out."""
        return (self.u * self.s) @ self.vh


class Head(NamedTuple):
    """Linear classifier of one task on the L2-normalised feature."""

    weight: ArrayLike  # [C, E]
    bias: ArrayLike | None = None  # [C]


class TaskVector(NamedTuple):
    """What one fine-tuned model adds to the base."""

    full: Params  # untruncated delta of every parameter
    matrices: dict[str, Factors]  # kept factors of the 2-D parameters
    vectors: Params  # whole deltas of all other parameters


class Forward(NamedTuple):
    """Result of one pass through the vision tower."""

    feature: Array  # [B, E], after ln_post and proj, not normalised
    attn_inputs: list[Array]  # per block, after ln_1, [B, N, D]
    mlp_inputs: list[Array]  # per block, after ln_2, [B, N, D]


@dataclass(frozen=True)
class Settings:
    """Every choice of the method.

    Attributes:
        num_heads: Attention heads of the vision tower.
        layer: Index of the block at which the router reads its feature.
        activation: `gelu` (exact, with erf) or `quick_gelu`.
        rank_ratio: Share of the singular values to keep, one for all tasks or one per task; None is 1/T.
        ranks: Ranks to keep instead of a ratio, one for all tasks or one per task.
        router_rank_ratio: Like `rank_ratio`, for the router's bases alone; None keeps the rank of the merge.
        router_ranks: Like `ranks`, for the router's bases alone.
        base_merge: First-pass weights: `tsvm`, `isotropic`, `mean` or `zeroshot`.
        site: Where the router reads: `mlp` (after ln_2, basis c_fc) or `attn` (after ln_1, basis in_proj).
        token: Token that the router reads: `cls` or the `mean` of all.
        norm: Norm of the residual: `l2`, `l1` or `mahalanobis`.
        mode: How gates become sets: `topk`, `top1` or `weighted`.
        threshold: A gate must be larger than this to be selected.
        temperature: Divisor inside the softmax of the gates.
        max_tasks: Cap on the set in mode `topk`; None is no cap.
        compose: Second-pass matrices: `tsvm` or `sum`.
        sum_weights: Weights of `compose=sum`: `sum`, `mean`, `gates` or `gates_normalized`.
        vectors: Second-pass vector parameters: `mean` of the deltas of the set, or `base`.
        head_choice: How the answering head is chosen: largest `max` logit or largest `mean` logit.
        polar_tolerance: Relative bound below which a polar factor drops a singular value.
        null_tolerance: Relative bound up to which a direction of a delta counts as null; None keeps all.
    """

    num_heads: int
    layer: int
    activation: str = "gelu"
    rank_ratio: float | Sequence[float] | None = None
    ranks: int | Sequence[int] | None = None
    router_rank_ratio: float | Sequence[float] | None = None
    router_ranks: int | Sequence[int] | None = None
    base_merge: str = "tsvm"
    site: str = "mlp"
    token: str = "cls"
    norm: str = "l2"
    mode: str = "topk"
    threshold: float = 0.2
    temperature: float = 1.0
    max_tasks: int | None = 3
    compose: str = "tsvm"
    sum_weights: str = "sum"
    vectors: str = "mean"
    head_choice: str = "max"
    polar_tolerance: float = 1e-4
    null_tolerance: float | None = 1e-12


# --- the vision tower -------------------------------------------------------------------------------------


def as_float64(params: Mapping[str, ArrayLike]) -> Params:
    """Copy parameters to float64 arrays."""
    return {name: np.array(value, dtype=np.float64) for name, value in params.items()}


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """Normalise over the last axis (population variance, eps 1e-5), then scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + LAYER_NORM_EPS) * weight + bias


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def activate(x: Array, activation: str) -> Array:
    """Apply `gelu` (exact) or `quick_gelu`."""
    if activation == "gelu":
        erf = np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2.0)).astype(np.float64)
        return 0.5 * x * (1.0 + erf)
    if activation == "quick_gelu":
        return x / (1.0 + np.exp(-1.702 * x))
    raise ValueError(f"unknown activation {activation!r}")


def attention(params: Params, prefix: str, x: Array, num_heads: int) -> Array:
    """Multi-head self-attention on `x [B, N, D]` with the fused q, k, v weight."""
    B, N, D = x.shape
    qkv = x @ params[f"{prefix}.in_proj_weight"].T + params[f"{prefix}.in_proj_bias"]

    def split_heads(part: Array) -> Array:
        return part.reshape(B, N, num_heads, D // num_heads).transpose(0, 2, 1, 3)  # [B, heads, N, D/heads]

    q, k, v = (split_heads(part) for part in np.split(qkv, 3, axis=-1))
    weights = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(D // num_heads))
    mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(B, N, D)
    return mixed @ params[f"{prefix}.out_proj.weight"].T + params[f"{prefix}.out_proj.bias"]


def count_blocks(params: Mapping[str, Any]) -> int:
    """Number of transformer blocks that the parameter names describe."""
    return sum(name.startswith("transformer.resblocks.") and name.endswith(".ln_1.weight") for name in params)


def vit_forward(
    params: Mapping[str, ArrayLike],
    images: ArrayLike,
    num_heads: int,
    activation: str = "gelu",
) -> Forward:
    """Run the open_clip vision tower.

    Args:
        params: Parameters named as in open_clip, without the `visual.` prefix.
        images: Preprocessed images `[B, 3, H, W]`.
        num_heads: Attention heads.
        activation: `gelu` or `quick_gelu`.

    Returns:
        The projected CLS feature and, for each block, the tokens that enter `attn` and `mlp`.
    """
    p = as_float64(params)
    pixels = np.asarray(images, dtype=np.float64)
    B, channels, H, W = pixels.shape
    D, _, P, _ = p["conv1.weight"].shape
    patches = pixels.reshape(B, channels, H // P, P, W // P, P)
    tokens = np.einsum("bchpwq,dcpq->bhwd", patches, p["conv1.weight"]).reshape(B, -1, D)
    cls = np.broadcast_to(p["class_embedding"], (B, 1, D))
    x = np.concatenate([cls, tokens], axis=1) + p["positional_embedding"]
    x = layer_norm(x, p["ln_pre.weight"], p["ln_pre.bias"])

    attn_inputs: list[Array] = []
    mlp_inputs: list[Array] = []
    for i in range(count_blocks(p)):
        block = f"transformer.resblocks.{i}"
        h = layer_norm(x, p[f"{block}.ln_1.weight"], p[f"{block}.ln_1.bias"])
        attn_inputs.append(h)
        x = x + attention(p, f"{block}.attn", h, num_heads)
        h = layer_norm(x, p[f"{block}.ln_2.weight"], p[f"{block}.ln_2.bias"])
        mlp_inputs.append(h)
        h = activate(h @ p[f"{block}.mlp.c_fc.weight"].T + p[f"{block}.mlp.c_fc.bias"], activation)
        x = x + h @ p[f"{block}.mlp.c_proj.weight"].T + p[f"{block}.mlp.c_proj.bias"]

    pooled = layer_norm(x[:, 0], p["ln_post.weight"], p["ln_post.bias"])
    return Forward(pooled @ p["proj"], attn_inputs, mlp_inputs)


# --- task vectors -----------------------------------------------------------------------------------------


def is_matrix(value: Array) -> bool:
    """Whether a parameter is decomposed (2-D) rather than kept whole."""
    return value.ndim == 2


def rank_for(shape: tuple[int, ...], ratio: float, rank: int | None = None) -> int:
    """Rank of a matrix: `max(1, int(min(shape) * ratio))` or the `rank` given, at most `min(shape)`."""
    smallest = min(shape)
    wanted = int(smallest * ratio) if rank is None else rank
    return min(max(1, wanted), smallest)


def truncate(delta: Array, rank: int, null_tolerance: float | None = 1e-12) -> Factors:
    """Keep the top `rank` triplets of the thin SVD; null directions become zero, see the top of the file."""
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    alive = np.ones(s.shape, dtype=bool) if null_tolerance is None else s > null_tolerance * s[0]
    u, s, vh = u * alive, s * alive, vh * alive[:, None]
    return Factors(u[:, :rank], s[:rank], vh[:rank])


def per_task(value: Any, index: int) -> Any:
    """Pick the entry of one task from a sequence; a scalar or None serves all tasks."""
    return value[index] if isinstance(value, Sequence | np.ndarray) else value


def subtract(base: Params, finetuned: Params) -> Params:
    """Full delta of every parameter; the two models must have the same names and shapes."""
    if base.keys() != finetuned.keys():
        raise ValueError(f"parameter names differ: {sorted(base.keys() ^ finetuned.keys())}")
    for name, value in base.items():
        if value.shape != finetuned[name].shape:
            raise ValueError(f"shapes of {name} differ: {value.shape} and {finetuned[name].shape}")
    return {name: finetuned[name] - base[name] for name in base}


def make_task_vectors(
    base: Mapping[str, ArrayLike],
    finetuned: Sequence[Mapping[str, ArrayLike]],
    rank_ratio: float | Sequence[float] | None = None,
    ranks: int | Sequence[int] | None = None,
    null_tolerance: float | None = 1e-12,
) -> list[TaskVector]:
    """Decompose fine-tuned models.

    Args:
        base: Parameters of the shared base.
        finetuned: Parameters of the T fine-tuned models.
        rank_ratio: Share of singular values to keep, for all tasks or per task; None is 1/T.
        ranks: Ranks instead of a ratio, for all tasks or per task.
        null_tolerance: Relative bound up to which a direction counts as null; None keeps all.

    Returns:
        One task vector per fine-tuned model.
    """
    ratio = 1.0 / len(finetuned) if rank_ratio is None else rank_ratio
    start = as_float64(base)
    result = []
    for i, model in enumerate(finetuned):
        full = subtract(start, as_float64(model))
        matrices = {
            name: truncate(d, rank_for(d.shape, per_task(ratio, i), per_task(ranks, i)), null_tolerance)
            for name, d in full.items()
            if is_matrix(d)
        }
        vectors = {name: d for name, d in full.items() if not is_matrix(d)}
        result.append(TaskVector(full, matrices, vectors))
    return result


# --- merging ----------------------------------------------------------------------------------------------


def polar(stack: Array, tolerance: float = 1e-4) -> Array:
    """Polar factor `P @ Q^T` of the thin SVD `P diag(sigma) Q^T`.

    Singular values that are at most `tolerance` times the largest are dropped, as a pseudo-inverse of
    `(stack^T stack)^(1/2)` would drop them. A zero stack gives zeros.
    """
    p, sigma, qt = np.linalg.svd(stack, full_matrices=False)
    keep = sigma > tolerance * sigma[0]
    return p[:, keep] @ qt[keep]


def tsvm_delta(factors: Sequence[Factors], tolerance: float = 1e-4) -> Array:
    """TSV-M: orthogonalise the stacked bases, keep the singular values, multiply out."""
    U = np.concatenate([f.u for f in factors], axis=1)  # [D_out, sum R]
    S = np.concatenate([f.s for f in factors])  # [sum R]
    VH = np.concatenate([f.vh for f in factors], axis=0)  # [sum R, D_in]
    return (polar(U, tolerance) * S) @ polar(VH, tolerance)


def isotropic_delta(deltas: Sequence[Array], tolerance: float = 1e-12) -> Array:
    """Mean singular value of the summed delta times the polar factor of that sum."""
    total = np.sum(deltas, axis=0)
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total, tolerance)


def mean_delta(deltas: Sequence[Array]) -> Array:
    """Arithmetic mean of deltas."""
    return np.mean(deltas, axis=0)


def merge_fixed(
    base: Mapping[str, ArrayLike],
    tasks: Sequence[TaskVector],
    method: str = "tsvm",
    polar_tolerance: float = 1e-4,
    null_tolerance: float | None = 1e-12,
    *,
    truncated: bool = False,
) -> Params:
    """Merge all tasks into the weights of the first pass.

    Args:
        base: Parameters of the base.
        tasks: Task vectors of all tasks.
        method: `tsvm`, `isotropic`, `mean` or `zeroshot`.
        polar_tolerance: Relative bound of the polar factors of `tsvm`.
        null_tolerance: Relative bound of the polar factor of `isotropic`; None drops nothing but exact zeros.
        truncated: Build `isotropic` and `mean` matrices from the truncated deltas instead of the full ones.

    Returns:
        Merged parameters.
    """
    if method not in {"tsvm", "isotropic", "mean", "zeroshot"}:
        raise ValueError(f"unknown base merge {method!r}")
    merged = as_float64(base)
    if method == "zeroshot":
        return merged
    for name, value in merged.items():
        if not is_matrix(value):
            merged[name] = value + mean_delta([t.vectors[name] for t in tasks])
            continue
        if method == "tsvm":
            merged[name] = value + tsvm_delta([t.matrices[name] for t in tasks], polar_tolerance)
            continue
        deltas = [t.matrices[name].dense() if truncated else t.full[name] for t in tasks]
        if method == "isotropic":
            merged[name] = value + isotropic_delta(deltas, null_tolerance or 0.0)
        else:
            merged[name] = value + mean_delta(deltas)
    return merged


def sum_weights_of(selected: Sequence[int], kind: str = "sum", gates: Array | None = None) -> Array:
    """Weights `w_i` of `compose=sum` for the tasks of a set.

    Args:
        selected: Task indices of the set.
        kind: `sum` (1 each), `mean` (1/|set|), `gates` (raw gate values) or `gates_normalized` (gates
            rescaled to sum to 1 over the set).
        gates: Gates of all T tasks for the sample; needed by the two gate kinds.

    Returns:
        One weight per entry of `selected`.
    """
    if kind == "sum":
        return np.ones(len(selected))
    if kind == "mean":
        return np.full(len(selected), 1.0 / len(selected))
    if kind in {"gates", "gates_normalized"}:
        if gates is None:
            raise ValueError(f"sum_weights={kind!r} needs gates")
        picked = np.asarray(gates, dtype=np.float64)[list(selected)]
        return picked if kind == "gates" else picked / picked.sum()
    raise ValueError(f"unknown sum_weights {kind!r}")


def merge_set(
    base: Mapping[str, ArrayLike],
    tasks: Sequence[TaskVector],
    selected: Sequence[int],
    compose: str = "tsvm",
    *,
    vectors: str = "mean",
    sum_weights: str = "sum",
    gates: Array | None = None,
    polar_tolerance: float = 1e-4,
) -> Params:
    """Merge the tasks of one set into the weights of the second pass, from the base.

    Args:
        base: Parameters of the base (not of the first pass).
        tasks: Task vectors of all tasks.
        selected: Task indices of the set; their order does not matter beyond rounding.
        compose: `tsvm` or `sum`.
        vectors: `mean` of the deltas of the set for vector parameters, or `base`.
        sum_weights: Weights of `compose=sum`, see `sum_weights_of`.
        gates: Gates of the sample, for gate weights only.
        polar_tolerance: Relative bound of the polar factors.

    Returns:
        Merged parameters.
    """
    if compose not in {"tsvm", "sum"}:
        raise ValueError(f"unknown compose {compose!r}")
    if vectors not in {"mean", "base"}:
        raise ValueError(f"unknown vectors {vectors!r}")
    chosen = [tasks[i] for i in selected]
    merged = as_float64(base)
    for name, value in merged.items():
        if not is_matrix(value):
            if vectors == "mean":
                merged[name] = value + mean_delta([t.vectors[name] for t in chosen])
        elif compose == "tsvm":
            merged[name] = value + tsvm_delta([t.matrices[name] for t in chosen], polar_tolerance)
        else:
            weights = sum_weights_of(selected, sum_weights, gates)
            terms = [w * t.matrices[name].dense() for w, t in zip(weights, chosen, strict=True)]
            merged[name] = value + np.sum(terms, axis=0)
    return merged


# --- router -----------------------------------------------------------------------------------------------


def router_weight_name(layer: int, site: str) -> str:
    """Name of the matrix whose `vh` is the basis of the router."""
    if site == "mlp":
        return f"transformer.resblocks.{layer}.mlp.c_fc.weight"
    if site == "attn":
        return f"transformer.resblocks.{layer}.attn.in_proj_weight"
    raise ValueError(f"unknown site {site!r}")


def router_feature(
    forward: Forward,
    layer: int,
    site: str = "mlp",
    token: str = "cls",  # noqa: S107
) -> Array:
    """Feature `z [B, D]` that the router reads from the first pass."""
    if site not in {"mlp", "attn"}:
        raise ValueError(f"unknown site {site!r}")
    tokens = (forward.mlp_inputs if site == "mlp" else forward.attn_inputs)[layer]
    match token:
        case "cls":
            return tokens[:, 0]
        case "mean":
            return tokens.mean(axis=1)
        case _:
            raise ValueError(f"unknown token {token!r}")


def residual_norm(r: Array, vh: Array, norm: str = "l2") -> Array:
    """Norm of residual vectors `r [B, D]`.

    `mahalanobis` is `sqrt(r^T C^-1 r)` with C the unbiased covariance of the rows of `vh` plus 1e-3 I. As the
    residual is orthogonal to these rows it equals `l2 / sqrt(1e-3)`; the formula is computed all the same.
    """
    if norm == "l2":
        return np.sqrt((r**2).sum(axis=-1))
    if norm == "l1":
        return np.abs(r).sum(axis=-1)
    if norm == "mahalanobis":
        centred = vh - vh.mean(axis=0)
        covariance = centred.T @ centred / max(len(vh) - 1, 1)
        solved = np.linalg.solve(covariance + COVARIANCE_RIDGE * np.eye(vh.shape[1]), r.T).T
        return np.sqrt((r * solved).sum(axis=-1))
    raise ValueError(f"unknown norm {norm!r}")


def router_residuals(z: Array, bases: Sequence[Array], norm: str = "l2") -> Array:
    """Distances `[B, T]` of features `z [B, D]` from the row spaces of the bases `vh_i [R_i, D]`."""
    return np.stack([residual_norm(z - z @ vh.T @ vh, vh, norm) for vh in bases], axis=1)


def router_gates(residuals: Array, mode: str = "topk", temperature: float = 1.0) -> Array:
    """Gates `[B, T]` from residuals `[B, T]` in mode `topk`, `top1` or `weighted`."""
    T = residuals.shape[1]
    if mode == "top1":
        return np.eye(T)[residuals.argmin(axis=1)]
    if mode == "weighted":
        return softmax(-residuals / temperature)
    if mode == "topk":
        score = -residuals
        std = score.std(axis=1, ddof=1, keepdims=True) if T > 1 else np.zeros_like(score)
        return softmax((score - score.mean(axis=1, keepdims=True)) / (std + STD_EPS) / temperature)
    raise ValueError(f"unknown mode {mode!r}")


def select_tasks(
    gates: Array,
    mode: str = "topk",
    threshold: float = 0.2,
    max_tasks: int | None = 3,
) -> tuple[int, ...]:
    """Selected tasks of one sample, in selection order.

    Ascending task index; descending gate (ties by ascending index) when the cap of `topk` has cut the set.

    Args:
        gates: Gates `[T]` of the sample.
        mode: `topk`, `top1` or `weighted`.
        threshold: A gate passes when it is strictly larger.
        max_tasks: Cap of `topk`; None is no cap.

    Returns:
        Task indices; never empty.
    """
    best = int(np.argmax(gates))
    if mode == "top1":
        return (best,)
    if mode not in {"topk", "weighted"}:
        raise ValueError(f"unknown mode {mode!r}")
    passed = [i for i, gate in enumerate(gates) if gate > threshold]
    if not passed:
        return (best,)
    if mode == "topk" and max_tasks is not None and len(passed) > max_tasks:
        return tuple(sorted(passed, key=lambda i: (-gates[i], i))[:max_tasks])
    return tuple(passed)


# --- heads ------------------------------------------------------------------------------------------------


def normalize(feature: Array) -> Array:
    """Divide by the L2 norm over the last axis (at least 1e-12)."""
    return feature / np.maximum(np.sqrt((feature**2).sum(axis=-1, keepdims=True)), NORMALIZE_EPS)


def head_logits(feature: Array, head: Head) -> Array:
    """Logits `[B, C]` of one head on features `[B, E]`, which are normalised here."""
    logits = normalize(feature) @ np.asarray(head.weight, dtype=np.float64).T
    return logits if head.bias is None else logits + np.asarray(head.bias, dtype=np.float64)


def choose_head(logits: Sequence[Array], order: Sequence[int], head_choice: str = "max") -> tuple[int, int]:
    """Task and class that answer for one sample.

    Args:
        logits: Logits `[C_i]` of every task's head, T of them.
        order: Selected tasks in selection order; the first of equals wins.
        head_choice: `max` or `mean`.

    Returns:
        Task index and class index within that task.
    """
    if head_choice not in {"max", "mean"}:
        raise ValueError(f"unknown head choice {head_choice!r}")
    scores = [logits[i].max() if head_choice == "max" else logits[i].mean() for i in order]
    task = order[int(np.argmax(scores))]
    return task, int(np.argmax(logits[task]))


# --- all of it --------------------------------------------------------------------------------------------


def router_bases(
    base: Mapping[str, ArrayLike],
    finetuned: Sequence[Mapping[str, ArrayLike]],
    settings: Settings,
) -> list[Array]:
    """Bases `vh_i` of the router, at their own rank where the settings give one."""
    name = router_weight_name(settings.layer, settings.site)
    own = settings.router_rank_ratio is not None or settings.router_ranks is not None
    tasks = make_task_vectors(
        {name: base[name]},
        [{name: model[name]} for model in finetuned],
        settings.router_rank_ratio if own else settings.rank_ratio,
        settings.router_ranks if own else settings.ranks,
        settings.null_tolerance,
    )
    return [t.matrices[name].vh for t in tasks]


def run_mass(
    base: Mapping[str, ArrayLike],
    finetuned: Sequence[Mapping[str, ArrayLike]],
    heads: Sequence[Head],
    images: ArrayLike,
    settings: Settings,
    *,
    task: int | Sequence[int] | None = None,
    first_pass: Mapping[str, ArrayLike] | None = None,
) -> dict[str, Any]:
    """Classify images with MASS from start to end.

    Args:
        base: Parameters of the base vision tower.
        finetuned: Parameters of the T fine-tuned vision towers.
        heads: One head per task.
        images: Preprocessed images `[B, 3, H, W]`.
        settings: Choices of the method.
        task: Known task, one for all images or one per image; the first pass is then skipped.
        first_pass: Parameters for the first pass in place of `settings.base_merge`.

    Returns:
        `z [B, D]` (None with a known task), `residuals [B, T]`, `gates [B, T]`, `orders` (tuples of task
        indices in selection order), `sets` (the same as frozensets), `features [B, E]` of the second pass
        before normalisation, `logits` (T arrays `[B, C_i]`, every head on that feature), `tasks [B]`,
        `classes [B]`, and `merged` (parameters by selection order; empty with gate weights).
    """
    pixels = np.asarray(images, dtype=np.float64)
    B, T = len(pixels), len(finetuned)
    vectors = make_task_vectors(base, finetuned, settings.rank_ratio, settings.ranks, settings.null_tolerance)

    z: Array | None = None
    if task is None:
        if first_pass is None:
            first_pass = merge_fixed(
                base,
                vectors,
                settings.base_merge,
                settings.polar_tolerance,
                settings.null_tolerance,
            )
        first = vit_forward(first_pass, pixels, settings.num_heads, settings.activation)
        z = router_feature(first, settings.layer, settings.site, settings.token)
        residuals = router_residuals(z, router_bases(base, finetuned, settings), settings.norm)
        gates = router_gates(residuals, settings.mode, settings.temperature)
        orders = [select_tasks(g, settings.mode, settings.threshold, settings.max_tasks) for g in gates]
    else:
        known = np.broadcast_to(np.asarray(task, dtype=np.int64), (B,))
        residuals = np.full((B, T), np.nan)
        gates = np.eye(T)[known]
        orders = [(int(i),) for i in known]

    def second_pass_params(order: tuple[int, ...], sample_gates: Array) -> Params:
        return merge_set(
            base,
            vectors,
            order,
            settings.compose,
            vectors=settings.vectors,
            sum_weights=settings.sum_weights,
            gates=sample_gates,
            polar_tolerance=settings.polar_tolerance,
        )

    features = np.empty((B, np.shape(base["proj"])[1]))
    merged: dict[tuple[int, ...], Params] = {}
    by_sample = settings.compose == "sum" and settings.sum_weights.startswith("gates")
    for b, order in enumerate(orders):
        if by_sample:
            params = second_pass_params(order, gates[b])
        else:
            if order not in merged:
                merged[order] = second_pass_params(order, gates[b])
            params = merged[order]
        one = vit_forward(params, pixels[b : b + 1], settings.num_heads, settings.activation)
        features[b] = one.feature[0]

    logits = [head_logits(features, head) for head in heads]
    answers = [choose_head([x[b] for x in logits], orders[b], settings.head_choice) for b in range(B)]
    return {
        "z": z,
        "residuals": residuals,
        "gates": gates,
        "orders": orders,
        "sets": [frozenset(order) for order in orders],
        "features": features,
        "logits": logits,
        "tasks": np.array([t for t, _ in answers], dtype=np.int64),
        "classes": np.array([c for _, c in answers], dtype=np.int64),
        "merged": merged,
    }
