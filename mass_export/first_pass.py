"""The first pass: pixel values -> residuals, ending at the routing layer.

Nothing behind the routing feature is in the graph. With the CLS token and the mlp site the routing block
computes attention for the CLS query alone; with the attn site it computes only ln_1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from mass_export.graph import Graph
from mass_export.routing import COVARIANCE_RIDGE
from mass_export.spec import Norm, RouterSettings
from mass_export.vit_graph import Layers, attention_residual, block, cls_attention_residual, cls_row, embed


def add_first_pass(
    layers: Layers, router: RouterSettings, bases: Sequence[Tensor], pixel_values: ir.Value
) -> ir.Value:
    """Add the nodes of the first pass.

    Args:
        layers: first-pass parameters.
        router: routing layer, site, token, norm.
        bases: vh_i of the routing site, per task. [R_i, D]
        pixel_values: normalised images. [B, 3, H, W]

    Returns:
        residuals [B, T]
    """
    z = routing_feature(layers, router, pixel_values)
    return residuals(layers.graph, z, stack_bases(bases), router.norm)


def routing_feature(layers: Layers, router: RouterSettings, pixel_values: ir.Value) -> ir.Value:
    """What the router reads: -> z [B, D]."""
    graph, layer = layers.graph, router.layer
    assert layer is not None
    x = embed(layers, pixel_values)
    for index in range(layer):
        x = block(layers, index, x)
    if router.site == "mlp":
        attend = cls_attention_residual if router.token == "cls" else attention_residual
        h = layers.layer_norm(f"transformer.resblocks.{layer}.ln_2", attend(layers, layer, x))
    else:
        x = cls_row(layers, x) if router.token == "cls" else x
        h = layers.layer_norm(f"transformer.resblocks.{layer}.ln_1", x)
    if router.token == "mean":
        return graph.op("ReduceMean", h, graph.integers(1), keepdims=0)
    return graph.op("Reshape", h, graph.integers(-1, layers.spec.width))


def stack_bases(bases: Sequence[Tensor]) -> NDArray[np.float32]:
    """Pad with zero rows to the largest rank: [T, R, D]. A zero row changes no residual."""
    R = max(vh.shape[0] for vh in bases)
    stacked = np.zeros((len(bases), R, bases[0].shape[1]), dtype=np.float32)
    for i, vh in enumerate(bases):
        stacked[i, : vh.shape[0]] = vh.numpy()
    return stacked


def residuals(graph: Graph, z: ir.Value, vh: NDArray[np.float32], norm: Norm) -> ir.Value:
    """Projection residuals of z [B, D] against stacked bases [T, R, D]: -> [B, T].

    The rows of vh are orthonormal, so for l2 `residual^2 = ||z||^2 - ||vh z||^2`: one product for all tasks.
    The residual vector is orthogonal to the rows, so the Mahalanobis form of `mass_export.routing` is l2 / sqrt(1e-3).
    For l1 the residual vectors themselves are needed.
    """
    T, R, D = vh.shape
    if norm == "l1":
        stack = graph.weight("router.vh", vh)
        coefficients = graph.op("MatMul", z, graph.op("Transpose", stack, perm=[0, 2, 1]))  # [T, B, R]
        rest = graph.op("Sub", z, graph.op("MatMul", coefficients, stack))  # [T, B, D]
        return graph.op("Transpose", graph.op("ReduceL1", rest, graph.integers(-1), keepdims=0), perm=[1, 0])
    flat = graph.weight("router.vh.T", vh.reshape(T * R, D).T)
    coefficients = graph.op("Reshape", graph.op("MatMul", z, flat), graph.integers(-1, T, R))
    inside = graph.op("ReduceSumSquare", coefficients, graph.integers(-1), keepdims=0)  # [B, T]
    total = graph.op("ReduceSumSquare", z, graph.integers(-1), keepdims=1)  # [B, 1]
    squared = graph.op("Max", graph.op("Sub", total, inside), graph.scalar(0.0))
    if norm == "mahalanobis":
        squared = graph.op("Div", squared, graph.scalar(COVARIANCE_RIDGE))
    return graph.op("Sqrt", squared)
