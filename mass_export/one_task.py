"""Both passes for images that need one task each, shaped for CPUs: what the tasks change comes as inputs of the graphs.

A batch is S sets of m images, all images of a set with the same task (S = 1: the whole batch). The base's products run
over the whole batch, since small products cost a CPU much more for each image; the low-rank branches run set by set. A
single task needs no core (MASS.md section 4): `y = x W0^T + ((x VH^T) * s) U^T + b`.

- Bases, biases and LayerNorm parameters of all tasks are fed as they lie in the mapped weights file, those of a task
  together; the graph gathers the rows of the sets' tasks where it needs them, while they are in the cache.
- The patch convolution, where each task has it in full, is a graph of its own that runs set by set: it is not copied.
  Where the tasks' deltas are kept as bases it is a product like all others.
- Where the first pass runs on the base it is the same computation with bases of rank zero. The tower is then cut where
  the router has read enough, or may have: the blocks before run for both passes, then the router, the blocks behind, or
  both for those images of which the router is not sure. So a CPU holds the base's weights, which ONNX Runtime
  rearranges for itself, once.

`runtime.second_pass` divides a batch into sets. Inputs are described at `runtime.bundle.OneTaskSpec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

import mass_export
from mass_export.artifact import Artifact
from mass_export.first_pass import add_blocks, add_router, stops_of
from mass_export.graph import Graph
from mass_export.image_input import add_image_input
from mass_export.one_task_layers import OneTaskLayers
from mass_export.router_spec import Tap
from mass_export.second_pass import add_heads
from mass_export.stacked_bases import StackedBases
from mass_export.vit_graph import Layers, cut_patches, encode_rest, tokens
from mass_export.weights_file import WeightsFile
from runtime.bundle import OneTaskSpec, PreprocessSpec, VectorTables

ONE_TASK = "one_task"
PATCHES = "patches"

Outputs = dict[str, tuple[ir.Value, Sequence[int | str]]]


@dataclass(frozen=True)
class _Writer:
    """Writes the graphs of an artifact beside those of a bundle; they read the same weights."""

    artifact: Artifact
    weights: WeightsFile
    directory: Path
    bases: StackedBases
    tables: VectorTables | None
    preprocess: PreprocessSpec
    routes: bool

    def layers(self, graph: Graph) -> OneTaskLayers:
        """The layers of any tasks."""
        vision, own = self.artifact.info.vision, self.tables is not None
        return OneTaskLayers(graph, vision, self.artifact.base, self.bases, own_vectors=own)

    def write(self) -> OneTaskSpec:
        """The graphs of both passes, or of the second alone if the first has weights of its own."""
        info = self.artifact.info
        stops = stops_of(self.artifact) if self.routes else ()
        segments, routers, known = [], [], []
        for index, (start, stop) in enumerate(zip((0, *stops), stops, strict=False)):
            file, taps = self.segment(index, start, stop)
            known += taps
            segments.append(file)
            routers.append(self.router(index, stop, known))
        segments.append(self.rest(len(segments), stops[-1] if stops else 0))
        margin = 0.0 if info.calibration is None else info.calibration.stop_margin
        return OneTaskSpec(
            tuple(segments), self.patches(), self.tables, tuple(routers), margin, self.bases.tables
        )

    def segment(self, index: int, start: int, stop: int) -> tuple[str, list[Tap]]:
        """Blocks between two stops: the stream or the patches -> the stream and the features on the way."""
        graph, vision = Graph(f"{ONE_TASK}_{index}", self.weights), self.artifact.info.vision
        layers = self.layers(graph)
        features, stream = add_blocks(layers, self.artifact, self.start(layers, index, start), start, stop)
        outputs: Outputs = {stream_name(stop): (stream, ["B", self.rows(stop), vision.width])}
        outputs |= {feature_name(tap): (z, ["B", vision.width]) for tap, z in features.items()}
        layers.finish()
        return self.save(graph, outputs), list(features)

    def start(self, layers: OneTaskLayers, index: int, block: int) -> ir.Value:
        """What a segment begins with: the stream before a block, which the first segment makes of the patches.

        As layers hold it.
        """
        if index:
            return layers.held(self.stream(layers.graph, block))
        vision = self.artifact.info.vision
        shape: list[int | str] = ["B", vision.tokens - 1, vision.width]
        return tokens(layers, layers.graph.input(PATCHES, ir.DataType.FLOAT, shape))

    def patches(self) -> str:
        """Pixel values, and each task's own convolution [3*P*P, D] or its bases -> projected patches."""
        graph, vision = Graph(f"{ONE_TASK}_{PATCHES}", self.weights), self.artifact.info.vision
        images = add_image_input(graph, self.preprocess)
        if self.tables is not None and self.tables.conv1_bases is not None:
            layers = OneTaskLayers(graph, vision, self.artifact.base, self.bases, own_vectors=False)
            projected = layers.patch_projection(cut_patches(graph, vision, images))
            layers.finish()
            return self.save(graph, {PATCHES: (projected, ["B", vision.tokens - 1, vision.width])})
        side = 3 * vision.patch_size[0] * vision.patch_size[1]
        if self.tables is None:
            conv1 = Layers(graph, vision, self.artifact.base, "base.").patch_weight()
        else:
            conv1 = graph.input("conv1", ir.DataType.FLOAT, [side, vision.width])
        flat = graph.op("Reshape", cut_patches(graph, vision, images), graph.integers(-1, side))
        projected = graph.op(
            "Reshape", graph.op("MatMul", flat, conv1), graph.integers(-1, vision.tokens - 1, vision.width)
        )
        return self.save(graph, {PATCHES: (projected, ["B", vision.tokens - 1, vision.width])})

    def rows(self, block: int) -> int:
        """Tokens of the residual stream before a block."""
        info = self.artifact.info
        return 1 if block == info.vision.layers and info.router.token == "cls" else info.vision.tokens

    def router(self, index: int, stop: int, taps: Sequence[Tap]) -> str:
        """The stream and the features on the way -> residuals."""
        graph, info = Graph(f"{ONE_TASK}_router_{index}", self.weights), self.artifact.info
        stream = self.stream(graph, stop)
        given = {
            tap: graph.input(feature_name(tap), ir.DataType.FLOAT, ["B", info.vision.width]) for tap in taps
        }
        layers = Layers(graph, info.vision, self.artifact.base, "base.")
        residuals, unknown = add_router(layers, self.artifact, stop, given, stream)
        outputs: Outputs = {"residuals": (residuals, ["B", len(info.tasks)])}
        if unknown is not None:
            outputs["unknown"] = (unknown, ["B"])
        return self.save(graph, outputs)

    def rest(self, index: int, start: int) -> str:
        """The stream or the patches -> logits."""
        graph = Graph(f"{ONE_TASK}_{index}", self.weights)
        layers = self.layers(graph)
        feature = encode_rest(layers, start, self.start(layers, index, start), self.rows(start))
        logits = add_heads(graph, feature, self.artifact.heads)
        layers.finish()
        return self.save(graph, self.logits(logits))

    def stream(self, graph: Graph, block: int) -> ir.Value:
        shape: list[int | str] = ["B", self.rows(block), self.artifact.info.vision.width]
        return graph.input(stream_name(block), ir.DataType.FLOAT, shape)

    def logits(self, value: ir.Value) -> Outputs:
        return {"logits": (value, ["B", sum(len(task.classes) for task in self.artifact.info.tasks)])}

    def save(self, graph: Graph, outputs: Outputs) -> str:
        path = self.directory / f"{graph.name}.onnx"
        graph.save(path, outputs, mass_export.__version__)
        return path.name


def stream_name(block: int) -> str:
    """Name of the residual stream before a block."""
    return f"stream.{block}"


def feature_name(tap: Tap) -> str:
    """Name of a routing feature between the parts."""
    return f"z.{tap.layer}.{tap.site}"


def write_one_task(
    artifact: Artifact,
    weights: WeightsFile,
    directory: Path,
    bases: StackedBases,
    tables: VectorTables | None,
    preprocess: PreprocessSpec,
    *,
    routes: bool,
) -> OneTaskSpec:
    """Write the graphs beside the other two; they read the same weights.

    Args:
        artifact: of the bundle.
        weights: its weights file.
        directory: of the bundle.
        bases: stored in the weights file.
        tables: stored there, too; with a first pass on the base its own row comes last.
        preprocess: how images come in.
        routes: the graphs run the first pass, too; only if it runs on the base in the same precision.
    """
    return _Writer(artifact, weights, directory, bases, tables, preprocess, routes).write()
