"""The plain ViT as ONNX nodes, shared by both passes; mirrors `mass_export.vit` line by line.

`Layers` holds the parametric layers with dense weights: all that a plain tower or the first pass needs. The
second pass overrides them to add each sample's low-rank branch. The functions below are the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from mass_export.graph import Graph
from mass_export.spec import VisionSpec


class Layers:
    """Parametric layers of a tower with the given dense parameters.

    What they take and give is [B, rows, D], unless a subclass holds it otherwise and says how.

    Attributes:
        graph: where the nodes go.
        spec: the tower.
    """

    def __init__(self, graph: Graph, spec: VisionSpec, params: Mapping[str, Tensor], prefix: str) -> None:
        self.graph = graph
        self.spec = spec
        self._params = params
        self._prefix = prefix

    def held_shape(self, rows: int) -> ir.Value:
        """As layers hold `rows` tokens of each image, of width D."""
        return self.graph.integers(-1, rows, self.spec.width)

    def held(self, x: ir.Value) -> ir.Value:
        """[B, rows, D] -> as layers hold it."""
        return x

    def by_image(self, x: ir.Value, rows: int) -> ir.Value:
        """As layers hold it -> [B, rows, D]."""
        del rows
        return x

    def linear(self, name: str, x: ir.Value, columns: slice | None = None) -> ir.Value:
        """`x W^T + b`, or only some output columns of it: [B, rows, D_in] -> [B, rows, D_out].

        Args:
            name: the weight's name; its bias is `<layer>.bias`, or in_proj_bias for in_proj_weight.
            x: input.
            columns: contiguous range of outputs.
        """
        graph = self.graph
        weight, bias = self.transposed(name), self.parameter(bias_name(name))
        if columns is not None:
            weight, bias = self.take(weight, columns, axis=1), self.take(bias, columns, axis=0)
        return graph.op("Add", graph.op("MatMul", x, weight), bias)

    def layer_norm(self, name: str, x: ir.Value) -> ir.Value:
        """LayerNorm over the last axis."""
        scale, bias = self.parameter(f"{name}.weight"), self.parameter(f"{name}.bias")
        return self.graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.spec.layer_norm_eps)

    def patch_projection(self, patches: ir.Value) -> ir.Value:
        """The patch convolution as a product: [B, N-1, 3*P*P] -> [B, N-1, D]."""
        return self.graph.op("MatMul", patches, self.patch_weight())

    def positions(self) -> ir.Value:
        """Positional table with the class embedding added to row 0. [N, D] (or one per set)"""
        table = self._params["positional_embedding"].float().clone()
        table[0] += self._params["class_embedding"].float()
        return self.graph.weight(f"{self._prefix}positions", table.numpy())

    def with_positions(self, x: ir.Value) -> ir.Value:
        """Patches behind a row for CLS [B, N, D] -> tokens."""
        return self.graph.op("Add", x, self.positions())

    def projection(self, pooled: ir.Value) -> ir.Value:
        """`x proj`: [B, 1, D] -> [B, 1, E]."""
        return self.graph.op("MatMul", pooled, self.parameter("proj"))

    def parameter(self, name: str) -> ir.Value:
        """A parameter as it is."""
        return self.graph.weight(f"{self._prefix}{name}", self._params[name].float().numpy())

    def transposed(self, name: str) -> ir.Value:
        """A weight as `[D_in, D_out]`, the layout of MatMul's right side."""
        return self.graph.weight(f"{self._prefix}{name}.T", self._params[name].float().numpy().T)

    def patch_weight(self) -> ir.Value:
        """conv1.weight as [3*P*P, D]."""
        weight = self._params["conv1.weight"].float().flatten(1)
        return self.graph.weight(f"{self._prefix}conv1.weight.T", weight.numpy().T)

    def take(self, value: ir.Value, columns: slice, axis: int) -> ir.Value:
        """A contiguous range along one axis; folded at load when `value` is constant."""
        g = self.graph
        return g.op("Slice", value, g.integers(columns.start), g.integers(columns.stop), g.integers(axis))


def bias_name(weight_name: str) -> str:
    """in_proj_weight -> in_proj_bias, c_fc.weight -> c_fc.bias."""
    return weight_name.removesuffix("weight") + "bias"


def embed(layers: Layers, pixel_values: ir.Value) -> ir.Value:
    """Patches as a matrix product, CLS row, positions, ln_pre: [B, 3, H, W] -> [B, N, D]."""
    return tokens(layers, layers.patch_projection(cut_patches(layers.graph, layers.spec, pixel_values)))


def cut_patches(graph: Graph, spec: VisionSpec, pixel_values: ir.Value) -> ir.Value:
    """The pixels of each patch in a row: [B, 3, H, W] -> [B, N-1, 3*P*P]."""
    (high, wide), (ph, pw) = spec.grid, spec.patch_size
    x = pixel_values
    if (high * ph, wide * pw) != spec.image_size:  # a strided convolution ignores the rest, too
        ends = graph.integers(high * ph, wide * pw)
        x = graph.op("Slice", x, graph.integers(0, 0), ends, graph.integers(2, 3))
    x = graph.op("Reshape", x, graph.integers(-1, 3, high, ph, wide, pw))
    x = graph.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    return graph.op("Reshape", x, graph.integers(-1, high * wide, 3 * ph * pw))


def tokens(layers: Layers, patches: ir.Value) -> ir.Value:
    """CLS row, positions, ln_pre: projected patches [B, N-1, D] -> [B, N, D]."""
    graph = layers.graph
    x = graph.op("Pad", patches, graph.integers(0, 1, 0, 0, 0, 0))  # a zero row where CLS goes
    x = layers.with_positions(x)
    return layers.layer_norm("ln_pre", x) if layers.spec.ln_pre else x


def block(layers: Layers, index: int, x: ir.Value) -> ir.Value:
    """One residual block over all tokens: [B, N, D] -> [B, N, D]."""
    return mlp_residual(layers, index, attention_residual(layers, index, x))


def attention_residual(layers: Layers, index: int, x: ir.Value) -> ir.Value:
    """Residual stream after the block's attention: [B, N, D] -> [B, N, D]."""
    h = layers.layer_norm(f"transformer.resblocks.{index}.ln_1", x)
    qkv = layers.linear(f"transformer.resblocks.{index}.attn.in_proj_weight", h)
    q, k, v = _split_heads(layers, qkv, layers.spec.tokens, parts=3)
    return layers.graph.op("Add", x, _attend(layers, index, q, k, v, queries=layers.spec.tokens))


def cls_attention_residual(layers: Layers, index: int, x: ir.Value) -> ir.Value:
    """The same for the CLS token alone, when nothing else is read afterwards: [B, N, D] -> [B, 1, D]."""
    D = layers.spec.width
    name = f"transformer.resblocks.{index}.attn.in_proj_weight"
    h = layers.layer_norm(f"transformer.resblocks.{index}.ln_1", x)
    (q,) = _split_heads(layers, layers.linear(name, cls_row(layers, h), slice(0, D)), 1, parts=1)
    keys_and_values = layers.linear(name, h, slice(D, 3 * D))
    k, v = _split_heads(layers, keys_and_values, layers.spec.tokens, parts=2)
    return layers.graph.op("Add", cls_row(layers, x), _attend(layers, index, q, k, v, queries=1))


def mlp_residual(layers: Layers, index: int, x: ir.Value) -> ir.Value:
    """Residual stream after the block's MLP: [B, rows, D] -> [B, rows, D]."""
    name = f"transformer.resblocks.{index}."
    h = layers.layer_norm(f"{name}ln_2", x)
    h = _activate(layers, layers.linear(f"{name}mlp.c_fc.weight", h))
    return layers.graph.op("Add", x, layers.linear(f"{name}mlp.c_proj.weight", h))


def encode(layers: Layers, pixel_values: ir.Value) -> ir.Value:
    """The L2-normalised image feature: [B, 3, H, W] -> [B, E]. The last block runs for CLS alone."""
    return encode_rest(layers, 0, embed(layers, pixel_values))


def encode_rest(layers: Layers, start: int, x: ir.Value, rows: int | None = None) -> ir.Value:
    """`encode` from block `start` on; with no block left x may be of the CLS token alone: [B, rows, D] -> [B, E]."""
    last = layers.spec.layers - 1
    if start > last:
        return pool(layers, cls_row(layers, x, rows))
    for index in range(start, last):
        x = block(layers, index, x)
    x = cls_attention_residual(layers, last, x)
    return pool(layers, mlp_residual(layers, last, x))


def pool(layers: Layers, cls: ir.Value) -> ir.Value:
    """CLS token of the last residual stream -> L2-normalised image feature: [B, 1, D] -> [B, E]."""
    graph, spec = layers.graph, layers.spec
    feature = layers.projection(layers.layer_norm("ln_post", cls))  # [B, 1, E]
    feature = graph.op("Reshape", feature, graph.integers(-1, spec.embed_dim))
    length = graph.op("ReduceL2", feature, graph.integers(-1), keepdims=1)
    return graph.op("Div", feature, graph.op("Max", length, graph.scalar(1e-12)))


def cls_row(layers: Layers, x: ir.Value, rows: int | None = None) -> ir.Value:
    """[B, rows, D], by default all tokens -> [B, 1, D]."""
    if rows == 1:
        return x
    of_images = layers.by_image(x, layers.spec.tokens if rows is None else rows)
    return layers.held(layers.take(of_images, slice(0, 1), axis=1))


def _activate(layers: Layers, h: ir.Value) -> ir.Value:
    graph = layers.graph
    if layers.spec.activation == "gelu":
        return graph.op("Gelu", h)
    return graph.op("Mul", h, graph.op("Sigmoid", graph.op("Mul", h, graph.scalar(1.702))))


def _split_heads(layers: Layers, x: ir.Value, tokens: int, parts: int) -> list[ir.Value]:
    """[B, tokens, parts*D] -> `parts` values of [B, heads, tokens, D/heads]."""
    graph, spec = layers.graph, layers.spec
    x = graph.op("Reshape", x, graph.integers(-1, tokens, parts, spec.heads, spec.width // spec.heads))
    x = graph.op("Transpose", x, perm=[2, 0, 3, 1, 4])
    pieces = graph.split(x, [1] * parts, axis=0) if parts > 1 else [x]
    return [graph.op("Squeeze", piece, graph.integers(0)) for piece in pieces]


def _attend(layers: Layers, index: int, q: ir.Value, k: ir.Value, v: ir.Value, queries: int) -> ir.Value:
    """Softmax attention and output projection: -> [B, queries, D]."""
    graph, spec = layers.graph, layers.spec
    scale = np.float32((spec.width // spec.heads) ** -0.5)
    q = graph.op("Mul", q, graph.scalar(float(scale)))
    scores = graph.op("Softmax", graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    mixed = graph.op("Reshape", mixed, layers.held_shape(queries))
    return layers.linear(f"transformer.resblocks.{index}.attn.out_proj.weight", mixed)
