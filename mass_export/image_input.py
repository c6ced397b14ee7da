"""How images come into a graph: normalised, or as the bytes of their pixels with the normalisation inside."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mass_export.graph import Graph
from runtime.bundle import PreprocessSpec
from runtime.preprocess import normalized


def add_image_input(graph: Graph, spec: PreprocessSpec) -> ir.Value:
    """The graph's first input, as `spec.dtype` wants it: -> pixel_values [B, 3, H, W] float32.

    float32: `pixel_values [B, 3, H, W]` itself. uint8: `images [B, H, W, 3]`, then `(images / 255 - mean) / std` in the
    order of `runtime.preprocess`, so that both give the same bits.
    """
    if spec.dtype == "float32":
        return graph.input(spec.input_name, ir.DataType.FLOAT, ["B", *spec.input_shape])
    images = graph.input(spec.input_name, ir.DataType.UINT8, ["B", *spec.input_shape])
    x = graph.op("Div", graph.op("Cast", images, to=int(ir.DataType.FLOAT)), graph.scalar(255))
    mean, std = (graph.constant(np.array(values, np.float32)) for values in (spec.mean, spec.std))
    x = graph.op("Div", graph.op("Sub", x, mean), std)
    return graph.op("Transpose", x, perm=[0, 3, 1, 2])


def normalised(images: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    """What the graph makes of bytes: [B, H, W, 3] -> [B, 3, H, W]."""
    return np.ascontiguousarray(normalized(images, spec))


def mean_and_std(spec: PreprocessSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the normalisation, for images [.., 3, H, W]. [3, 1, 1] each"""
    return np.array(spec.mean, np.float32)[:, None, None], np.array(spec.std, np.float32)[:, None, None]


def nearest_bytes(pixel_values: NDArray[np.float32], spec: PreprocessSpec) -> NDArray[np.uint8]:
    """The bytes that come nearest to normalised images: [B, 3, H, W] -> [B, H, W, 3]."""
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    pixels = pixel_values.transpose(0, 2, 3, 1) * std + mean
    rounded: NDArray[np.uint8] = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return rounded
