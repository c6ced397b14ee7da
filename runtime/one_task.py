"""Both passes for images of one task on a CPU: the task's parameters go from the mapped file into the graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest, OneTaskSpec, map_array
from runtime.onnx_session import OnnxSession

Feeds = dict[str, NDArray[Any]]
NONE: Mapping[str, NDArray[Any]] = MappingProxyType({})


class OneTaskPass:
    """Runs the one-task graphs with any task's parameters; see `runtime.bundle.OneTaskSpec`. Thread-safe."""

    def __init__(
        self, directory: Path, manifest: Manifest, spec: OneTaskSpec, num_threads: int | None
    ) -> None:
        """Load the graphs and map the parameters of all tasks; none is read before a task is first run.

        Args:
            directory: of the bundle.
            manifest: of the bundle.
            spec: its `one_task`.
            num_threads: threads within an operator; None lets ONNX Runtime choose.

        Raises:
            BackendError: ONNX Runtime refuses a graph.
        """

        def load(file: str) -> _Part:
            return _Part(OnnxSession(directory / file, "cpu", num_threads))

        self._blocks = load(spec.file)
        self._router = None if spec.router is None else load(spec.router)
        self._rest = None if spec.rest is None else load(spec.rest)
        arrays = _stacked_parameters(directory, manifest)
        tables = _tables(directory, spec)
        self._feeds: list[Feeds] = [
            {name: np.asarray(array[task]) for name, array in (arrays | tables).items()}
            for task in range(len(manifest.tasks))
        ]
        self._base: Feeds = {name: array[0][:0] for name, array in arrays.items()}
        self._base |= {name: np.asarray(array[-1]) for name, array in tables.items()}

    @property
    def routes(self) -> bool:
        """Whether it runs the first pass, too."""
        return self._router is not None

    def first_pass(self, pixel_values: Any) -> dict[str, NDArray[Any]]:
        """What the first-pass graph puts out: the base's blocks, then the router.

        Args:
            pixel_values: normalised images. [B, 3, H, W] float32

        Returns:
            `residuals` [B, T] float32, and where the bundle has it `unknown` [B] float32

        Raises:
            BackendError: a session failed, or the first pass has weights of its own.
        """
        assert self._router is not None
        return self._router.run(self._blocks.run({"pixel_values": pixel_values}, self._base))

    def run(self, pixel_values: Any, task: int) -> NDArray[np.float32]:
        """Logits of every head under one task's model.

        Args:
            pixel_values: normalised images. [B, 3, H, W] float32
            task: index.

        Returns:
            logits: tasks in order. [B, sum C] float32

        Raises:
            BackendError: a session failed.
        """
        found = self._blocks.run({"pixel_values": pixel_values}, self._feeds[task])
        if self._rest is not None:
            found = self._rest.run({"stream": found["stream"]}, self._feeds[task])
        logits: NDArray[np.float32] = found["logits"]
        return logits

    def close(self) -> None:
        """Release the graphs."""
        for part in (self._blocks, self._router, self._rest):
            if part is not None:
                part.session.close()


class _Part:
    """A graph, and which of a task's parameters it takes."""

    def __init__(self, session: OnnxSession) -> None:
        self.session = session
        self._names = session.input_names()

    def run(self, images: Feeds, parameters: Mapping[str, NDArray[Any]] = NONE) -> Feeds:
        wanted = {name: parameters[name] for name in self._names if name in parameters}
        return self.session.run(images | wanted)


def _stacked_parameters(directory: Path, manifest: Manifest) -> Feeds:
    """Low-rank parameters of all tasks by input. [T, ..] each"""
    arrays: Feeds = {}
    for matrix in manifest.matrices:
        parts = {"right": matrix.vh, "scale": matrix.s, "left": matrix.u_t}
        arrays |= {f"{kind}.{matrix.name}": map_array(directory, array) for kind, array in parts.items()}
        for scale in (matrix.u_scale, matrix.vh_scale):
            if scale is not None:  # int8: the graph multiplies bare steps
                key = f"scale.{matrix.name}"
                arrays[key] = arrays[key] * map_array(directory, scale)
    return arrays


def _tables(directory: Path, spec: OneTaskSpec) -> Feeds:
    """The other parameters of all tasks, and of the base if it is there. [T or T+1, ..] each"""
    if spec.tables is None:
        return {}
    stored = {
        "vectors": spec.tables.vectors,
        "conv1": spec.tables.conv1,
        "conv1_scale": spec.tables.conv1_scale,
    }
    return {name: map_array(directory, array) for name, array in stored.items() if array is not None}
