"""The router's nodes: routing features -> residuals and how unknown an image is; mirrors `mass_export.routing`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact
from mass_export.graph import Graph
from mass_export.head_evidence import evidence_scales
from mass_export.router_spec import Norm, Tap
from mass_export.routing import (
    COVARIANCE_RIDGE,
    LEAST_DISTANCE,
    LEAST_LENGTH,
    RELATIVE_SCALE,
    UNKNOWN_RESIDUAL_WEIGHT,
)
from mass_export.second_pass import add_heads
from mass_export.vit_graph import Layers, cls_row, pool
from runtime.routing import STD_EPSILON

Features = dict[Tap, ir.Value]


def add_answer(
    layers: Layers, artifact: Artifact, features: Features, stream: ir.Value
) -> tuple[ir.Value, ir.Value | None]:
    """Residuals [B, T] and unknown [B] or None, of the features of the whole first pass.

    Args:
        layers: first-pass parameters.
        artifact: router settings, bases and heads.
        features: of all taps.
        stream: behind the last block; only head evidence reads it.
    """
    graph, info, router = layers.graph, artifact.info, artifact.info.router
    score, last_residuals, evidence, unknown = None, None, None, None
    if info.calibration is None or info.calibration.residual_weight:
        score, last_residuals = _residual_score(graph, artifact, features)
    if info.calibration is not None and info.calibration.discriminant:
        calibration = artifact.calibration
        assert calibration is not None
        assert calibration.weight is not None
        assert calibration.bias is not None
        z = _joined(graph, features, info.calibration.discriminant)
        posterior = _log_posterior(graph, z, calibration.weight, calibration.bias, "router.discriminant")
        posterior = graph.op("Mul", posterior, graph.scalar(info.calibration.discriminant_weight))
        score = graph.op("Neg", posterior) if score is None else graph.op("Sub", score, posterior)
    assert score is not None
    if router.evidence:
        assert router.evidence != "auto"
        evidence = _head_evidence(layers, artifact, stream)
        lead = evidence
        if router.standardize != "length":
            lead = standardize_over_tasks(graph, evidence, len(artifact.tasks))
        score = graph.op("Sub", score, graph.op("Mul", lead, graph.scalar(router.evidence)))
    if info.calibration is not None and info.calibration.unknown is not None:
        calibration = artifact.calibration
        assert calibration is not None
        assert calibration.whiten is not None
        assert calibration.centres is not None
        z = features[info.calibration.unknown]
        known = calibration.whiten, calibration.centres, calibration.nothing
        unknown = _whitened_distance(graph, z, *known, "router")
    elif last_residuals is not None:
        unknown = share = _least_share(graph, features[info.taps()[-1]], last_residuals, router.norm)
        if evidence is not None:
            best = graph.op("ReduceMax", evidence, graph.integers(-1), keepdims=0)
            unknown = graph.op("Sub", graph.op("Mul", share, graph.scalar(UNKNOWN_RESIDUAL_WEIGHT)), best)
    return score, unknown


def add_early_answer(
    graph: Graph, artifact: Artifact, index: int, features: Features
) -> tuple[ir.Value, ir.Value | None]:
    """The same at an early stop, by its number; its discriminant reads the first of the taps."""
    info, calibration = artifact.info.calibration, artifact.calibration
    assert info is not None
    assert calibration is not None
    assert calibration.stop_weight is not None
    assert calibration.stop_bias is not None
    taps = info.taps_before(info.stops[index])
    weight = calibration.stop_weight[index, :, : len(taps) * artifact.info.vision.width]
    z = _joined(graph, features, taps)
    posterior = _log_posterior(graph, z, weight, calibration.stop_bias[index], f"router.stop{index}")
    score = graph.op("Mul", posterior, graph.scalar(-info.discriminant_weight))
    known = calibration.known_at_stop(index)
    if known is None:
        return score, None
    return score, _whitened_distance(graph, features[taps[-1]], *known, f"router.stop{index}")


def add_choice(
    graph: Graph,
    artifact: Artifact,
    early: tuple[ir.Value, ir.Value | None],
    later: tuple[ir.Value, ir.Value | None],
) -> tuple[ir.Value, ir.Value | None]:
    """The early answer where its best task leads by the margin, else the later one."""
    info = artifact.info.calibration
    assert info is not None
    two = graph.top_two(early[0])  # [B, 2], smallest first
    second, first = (graph.op("Gather", two, graph.integers(i), axis=1) for i in (1, 0))
    sure = graph.op(
        "GreaterOrEqual", graph.op("Sub", second, first), graph.scalar(info.stop_margin)
    )  # [B, 1]
    score = graph.op("Where", sure, early[0], later[0])
    if early[1] is None or later[1] is None:
        return score, None
    flat = graph.op("Squeeze", sure, graph.integers(1))
    return score, graph.op("Where", flat, early[1], later[1])


def _residual_score(
    graph: Graph, artifact: Artifact, features: dict[Tap, ir.Value]
) -> tuple[ir.Value, ir.Value]:
    """Residuals of all taps, calibrated, standardised and averaged, and the plain ones of the last tap: [B, T] each"""
    info, calibration = artifact.info, artifact.calibration
    by_tap, last = [], None
    for index, tap in enumerate(info.taps()):
        bases = stack_bases([task[tap.parameter] for task in artifact.routing_bases])
        r = residuals(graph, features[tap], bases, info.router.norm, f"router.{tap.parameter}")
        last = r
        if info.router.standardize == "length":
            r = graph.op("Div", r, _length(graph, features[tap], info.router.norm, keepdims=1))
        if calibration is not None:
            r = graph.op("Sub", r, graph.constant(calibration.offset[index].float().numpy()))
            r = graph.op("Div", r, graph.constant(calibration.scale[index].float().numpy()))
        if info.router.standardize == "tasks":
            r = standardize_over_tasks(graph, r, len(info.tasks))
        by_tap.append(r)
    score = by_tap[0]
    for r in by_tap[1:]:
        score = graph.op("Add", score, r)
    share = 1 / len(by_tap) * (info.calibration.residual_weight if info.calibration is not None else 1.0)
    share *= RELATIVE_SCALE if info.router.standardize == "length" else 1.0
    score = graph.op("Mul", score, graph.scalar(share)) if share != 1 else score
    assert last is not None
    return score, last


def _least_share(graph: Graph, z: ir.Value, r: ir.Value, norm: Norm) -> ir.Value:
    """Smallest residual [B, T] as a share of the feature's own length, z [B, D]: -> [B]"""
    smallest = graph.op("ReduceMin", r, graph.integers(-1), keepdims=0)
    return graph.op("Div", smallest, _length(graph, z, norm, keepdims=0))


def _length(graph: Graph, z: ir.Value, norm: Norm, keepdims: int) -> ir.Value:
    """`mass_export.routing.feature_length`: [B, D] -> [B] or [B, 1]"""
    length = graph.op("ReduceL1" if norm == "l1" else "ReduceL2", z, graph.integers(-1), keepdims=keepdims)
    if norm == "mahalanobis":
        length = graph.op("Div", length, graph.scalar(COVARIANCE_RIDGE**0.5))
    return graph.op("Max", length, graph.scalar(LEAST_LENGTH))


def _whitened_distance(
    graph: Graph, z: ir.Value, whiten: Tensor, centres: Tensor, nothing: Tensor | None, name: str
) -> ir.Value:
    """`mass_export.routing.whitened_distance`: z [B, D] -> [B]"""
    white = graph.op("MatMul", z, graph.weight(f"{name}.whiten", whiten.float().numpy()))
    white = graph.op("Unsqueeze", white, graph.integers(1))

    def nearest(points: Tensor, what: str) -> ir.Value:
        differences = graph.op(
            "Sub", white, graph.weight(f"{name}.{what}", points.float().numpy())
        )  # [B, K, D]
        squared = graph.op("Mul", differences, differences)
        mean = graph.op("ReduceMean", squared, graph.integers(-1), keepdims=0)  # [B, K]
        return graph.op("Sqrt", graph.op("ReduceMin", mean, graph.integers(-1), keepdims=0))

    known = nearest(centres, "centres")
    if nothing is None:
        return known
    other = graph.op("Max", nearest(nothing, "nothing"), graph.scalar(LEAST_DISTANCE))
    return graph.op("Mul", known, graph.op("Max", graph.op("Div", known, other), graph.scalar(1.0)))


def _log_posterior(graph: Graph, z: ir.Value, weight: Tensor, bias: Tensor, name: str) -> ir.Value:
    """A linear discriminant's log probabilities: z [B, M*D] -> [B, T]"""
    logits = graph.op("MatMul", z, graph.weight(f"{name}.T", weight.float().numpy().T))
    logits = graph.op("Add", logits, graph.weight(f"{name}.bias", bias.float().numpy()))
    return graph.op("LogSoftmax", logits, axis=-1)


def _joined(graph: Graph, features: Features, taps: Sequence[Tap]) -> ir.Value:
    """Features of several taps, one after the other. [B, M*D]"""
    parts = [features[tap] for tap in taps]
    return graph.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]


def stack_bases(bases: Sequence[Tensor]) -> NDArray[np.float32]:
    """Pad with zero rows to the largest rank: [T, R, D]. A zero row changes no residual."""
    R = max(vh.shape[0] for vh in bases)
    stacked = np.zeros((len(bases), R, bases[0].shape[1]), dtype=np.float32)
    for i, vh in enumerate(bases):
        stacked[i, : vh.shape[0]] = vh.numpy()
    return stacked


def residuals(graph: Graph, z: ir.Value, vh: NDArray[np.float32], norm: Norm, name: str) -> ir.Value:
    """Projection residuals of z [B, D] against stacked bases [T, R, D]: -> [B, T].

    The rows of vh are orthonormal, so for l2 `residual^2 = ||z||^2 - ||vh z||^2`: one product for all tasks.
    The residual vector is orthogonal to the rows, so the Mahalanobis form of `mass_export.routing` is
    l2 / sqrt(1e-3). For l1 the residual vectors themselves are needed.
    """
    T, R, D = vh.shape
    if norm == "l1":
        stack = graph.weight(f"{name}.vh", vh)
        coefficients = graph.op("MatMul", z, graph.op("Transpose", stack, perm=[0, 2, 1]))  # [T, B, R]
        rest = graph.op("Sub", z, graph.op("MatMul", coefficients, stack))  # [T, B, D]
        return graph.op("Transpose", graph.op("ReduceL1", rest, graph.integers(-1), keepdims=0), perm=[1, 0])
    flat = graph.weight(f"{name}.vh.T", vh.reshape(T * R, D).T)
    coefficients = graph.op("Reshape", graph.op("MatMul", z, flat), graph.integers(-1, T, R))
    inside = graph.op("ReduceSumSquare", coefficients, graph.integers(-1), keepdims=0)  # [B, T]
    total = graph.op("ReduceSumSquare", z, graph.integers(-1), keepdims=1)  # [B, 1]
    squared = graph.op("Max", graph.op("Sub", total, inside), graph.scalar(0.0))
    if norm == "mahalanobis":
        squared = graph.op("Div", squared, graph.scalar(COVARIANCE_RIDGE))
    return graph.op("Sqrt", squared)


def standardize_over_tasks(graph: Graph, values: ir.Value, T: int) -> ir.Value:
    """Z-scores over the last axis, as in `mass_export.routing`; `values` is [B, T]."""
    centred = graph.op("Sub", values, graph.op("ReduceMean", values, graph.integers(-1), keepdims=1))
    total = graph.op("ReduceSumSquare", centred, graph.integers(-1), keepdims=1)
    deviation = graph.op("Sqrt", graph.op("Div", total, graph.scalar(max(T - 1, 1))))
    return graph.op("Div", centred, graph.op("Add", deviation, graph.scalar(STD_EPSILON)))


def _head_evidence(layers: Layers, artifact: Artifact, x: ir.Value) -> ir.Value:
    """`logsumexp(k / s_i * logits_i) - log C_i` of each head on the first pass' feature: -> [B, T]"""
    graph = layers.graph
    logits = add_heads(graph, pool(layers, cls_row(layers, x)), artifact.heads)
    logits = graph.op(
        "Mul", logits, graph.weight("router.evidence_scales", evidence_scales(artifact.heads).float().numpy())
    )
    sizes = [len(task.classes) for task in artifact.info.tasks]
    parts = graph.split(logits, sizes, axis=1) if len(sizes) > 1 else [logits]
    claims = [graph.op("ReduceLogSumExp", part, graph.integers(-1), keepdims=1) for part in parts]
    claim = graph.op("Concat", *claims, axis=1) if len(claims) > 1 else claims[0]
    return graph.op("Sub", claim, graph.constant(np.log(np.array(sizes, dtype=np.float32))))
