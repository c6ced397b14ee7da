"""The first pass: pixel values -> residuals, ending at the last tap of the router.

Nothing behind the last tap is in the graph: with the CLS token, the last block that is read computes attention
for the CLS query alone at the mlp site, and only ln_1 at the attn site. Head evidence needs the whole tower.
"""

from __future__ import annotations

import onnx_ir as ir

from mass_export.artifact import Artifact
from mass_export.router_graph import Features, add_answer, add_choice, add_early_answer
from mass_export.router_spec import Tap
from mass_export.vit_graph import (
    Layers,
    attention_residual,
    cls_attention_residual,
    cls_row,
    embed,
    mlp_residual,
)


def add_first_pass(
    layers: Layers, artifact: Artifact, pixel_values: ir.Value
) -> tuple[ir.Value, ir.Value | None]:
    """Add the nodes of the first pass; images that may stop early are answered as if they had.

    Args:
        layers: first-pass parameters.
        artifact: router settings, bases and heads.
        pixel_values: normalised images. [B, 3, H, W]

    Returns:
        as `add_router`
    """
    *early, last = stops_of(artifact)
    features, stream = add_blocks(layers, artifact, embed(layers, pixel_values), 0, last)
    features |= _features_behind(layers, artifact, last, stream)
    answer = add_answer(layers, artifact, features, stream)
    for index in reversed(range(len(early))):
        sooner = add_early_answer(layers.graph, artifact, index, features)
        answer = add_choice(layers.graph, artifact, sooner, answer)
    return answer


def stops_of(artifact: Artifact) -> tuple[int, ...]:
    """Where the first pass may end, ascending: blocks that are run before, at the last of them for all images."""
    calibration = artifact.info.calibration
    depth = artifact.info.vision.layers
    last = depth if artifact.info.router.evidence else max(artifact.info.read_taps()).layer
    return (*(() if calibration is None else calibration.stops), last)


def add_blocks(
    layers: Layers, artifact: Artifact, x: ir.Value, start: int, stop: int
) -> tuple[Features, ir.Value]:
    """Add blocks of the first pass.

    Args:
        layers: parameters.
        artifact: router settings.
        x: residual stream before block `start`, as layers hold it. [B, N, D]
        start: first block.
        stop: the block behind the last.

    Returns:
        routing features z [B, D] of the taps in these blocks; the residual stream behind them [B, N, D], or that of the
        CLS token [B, 1, D] if it has come to its end and nothing else is read
    """
    taps, token, depth = artifact.info.read_taps(), artifact.info.router.token, layers.spec.layers
    features: Features = {}
    rows = layers.spec.tokens
    for index in range(start, stop):
        if Tap(index, "attn") in taps:
            features[Tap(index, "attn")] = _read(
                layers, f"transformer.resblocks.{index}.ln_1", x, token, rows
            )
        if index == depth - 1 and token == "cls":
            x, rows = cls_attention_residual(layers, index, x), 1
        else:
            x = attention_residual(layers, index, x)
        if Tap(index, "mlp") in taps:
            features[Tap(index, "mlp")] = _read(layers, f"transformer.resblocks.{index}.ln_2", x, token, rows)
        x = mlp_residual(layers, index, x)
    return features, layers.by_image(x, rows)


def add_router(
    layers: Layers, artifact: Artifact, stop: int, features: Features, stream: ir.Value
) -> tuple[ir.Value, ir.Value | None]:
    """Add what the router makes of the features at one of `stops_of`, and of the block there as far as it is read.

    Args:
        layers: first-pass parameters.
        artifact: router settings, bases and heads.
        stop: blocks that were run.
        features: of these blocks.
        stream: behind them.

    Returns:
        residuals [B, T]; unknown [B] or None, see `mass_export.routing.unknown_score` and `whitened_distance`
    """
    features = features | _features_behind(layers, artifact, stop, stream)
    *early, last = stops_of(artifact)
    if stop == last:
        return add_answer(layers, artifact, features, stream)
    return add_early_answer(layers.graph, artifact, early.index(stop), features)


def _features_behind(layers: Layers, artifact: Artifact, index: int, x: ir.Value) -> Features:
    """Features of block `index`, whose input is x; none of an x that has come to its end."""
    taps, token = artifact.info.read_taps(), artifact.info.router.token
    features: Features = {}
    rows = layers.spec.tokens
    if Tap(index, "attn") in taps:
        features[Tap(index, "attn")] = _read(layers, f"transformer.resblocks.{index}.ln_1", x, token, rows)
    if Tap(index, "mlp") in taps:
        if token == "cls":
            after, rows = cls_attention_residual(layers, index, x), 1
        else:
            after = attention_residual(layers, index, x)
        features[Tap(index, "mlp")] = _read(layers, f"transformer.resblocks.{index}.ln_2", after, token, rows)
    return features


def _read(layers: Layers, norm: str, x: ir.Value, token: str, rows: int) -> ir.Value:
    """LayerNorm of the CLS token, or the mean over the tokens' LayerNorms: [B, rows, D] -> z [B, D]"""
    graph = layers.graph
    if token == "mean":
        h = layers.by_image(layers.layer_norm(norm, x), rows)
        return graph.op("ReduceMean", h, graph.integers(1), keepdims=0)
    h = layers.layer_norm(norm, cls_row(layers, x, rows))
    return graph.op("Reshape", h, graph.integers(-1, layers.spec.width))
