"""Both passes for images that need one task each, on a CPU: parameters go from the mapped file into the graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest, VectorTables, all_matrices
from runtime.mapped_files import MappedFiles
from runtime.onnx_session import OnnxSession
from runtime.verification import two_best

Feeds = dict[str, NDArray[Any]]
NONE: Mapping[str, NDArray[Any]] = MappingProxyType({})


class OneTaskPass:
    """Runs the one-task graphs with any tasks' parameters; see `runtime.bundle.OneTaskSpec`. Thread-safe."""

    def __init__(self, directory: Path, manifest: Manifest, num_threads: int | None) -> None:
        """Load the graphs and map the parameters of all tasks; none is read before a task is first run.

        Args:
            directory: of the bundle.
            manifest: of the bundle; has a `one_task`.
            num_threads: threads within an operator; None lets ONNX Runtime choose.

        Raises:
            BackendError: ONNX Runtime refuses a graph.
        """
        spec = manifest.one_task
        assert spec is not None

        def load(file: str) -> _Part:
            return _Part(OnnxSession(directory / file, "cpu", num_threads))

        files = MappedFiles(directory)
        with ThreadPoolExecutor(len(spec.files)) as pool:
            parts = {file: pool.submit(load, file) for file in spec.files}
            own, shared = _own_stacks(files, manifest), _shared_by_both_passes(files, manifest)
        self._patches, self._images = parts[spec.patches].result(), manifest.preprocess.input_name
        self._segments = [parts[file].result() for file in spec.segments]
        self._routers = [parts[file].result() for file in spec.routers]
        self._stop_margin = spec.stop_margin
        self._stacks = own | shared
        self._base: Feeds = {name: array[:1, :0] for name, array in own.items()} | shared
        self._conv1: list[Feeds] = []
        if spec.tables is not None:
            vectors = files.array(spec.tables.vectors)
            self._stacks["vectors"], self._base["vectors"] = vectors, vectors[-1:]
            self._conv1 = _convolutions(files, spec.tables)

    @property
    def routes(self) -> bool:
        """Whether it runs the first pass, too."""
        return bool(self._routers)

    def first_pass(self, pixel_values: Any) -> dict[str, NDArray[Any]]:
        """What the first-pass graph puts out: the base's blocks up to a router that is sure, or the last.

        Args:
            pixel_values: images as the bundle takes them. [B, ..]

        Returns:
            `residuals` [B, T] float32, and where the bundle has it `unknown` [B] float32

        Raises:
            BackendError: a session failed.
        """
        rows = np.arange(len(pixel_values))
        state: Feeds = {"patches": self._projected(pixel_values, [-1]), "tasks": np.array([-1], np.int64)}
        answers: Feeds = {}
        for segment, router in zip(self._segments, self._routers, strict=False):
            state |= segment.run(state, self._base)
            found = router.run(state)
            for name, values in found.items():
                answers.setdefault(name, np.empty((len(pixel_values), *values.shape[1:]), values.dtype))
                answers[name][rows] = values
            if router is self._routers[-1]:
                break
            unsure = np.flatnonzero(two_best(found["residuals"])[1] < self._stop_margin)
            if not len(unsure):
                break
            rows = rows[unsure]
            state = {
                name: value if name == "tasks" else value[unsure]
                for name, value in state.items()
                if name == "tasks" or len(value) == len(found["residuals"])
            }
        return answers

    def run(self, pixel_values: Any, tasks: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every head, each image under its task's model.

        Args:
            pixel_values: images as the bundle takes them, as many of each task, in the order of `tasks`. [S*m, ..]
            tasks: indices. S of them

        Returns:
            logits: tasks in order. [S*m, sum C] float32

        Raises:
            BackendError: a session failed.
        """
        state: Feeds = {"tasks": np.array(tasks, np.int64), "patches": self._projected(pixel_values, tasks)}
        for segment in self._segments:
            state |= segment.run(state, self._stacks)
        logits: NDArray[np.float32] = state["logits"]
        return logits

    def _projected(self, pixel_values: Any, tasks: Sequence[int]) -> NDArray[np.float32]:
        """Patches under the tasks' own convolutions, -1 for the base's. [B, N-1, D]"""
        if not self._conv1:
            stacks = self._base if tasks == [-1] else self._stacks
            state = {self._images: pixel_values, "tasks": np.array(tasks, np.int64)}
            return self._patches.run(state, stacks)["patches"]
        each = len(pixel_values) // len(tasks)
        parts = [
            self._patches.run({self._images: pixel_values[row * each : (row + 1) * each]}, self._conv1[task])
            for row, task in enumerate(tasks)
        ]
        return np.concatenate([part["patches"] for part in parts]) if len(parts) > 1 else parts[0]["patches"]

    def close(self) -> None:
        """Release the graphs."""
        for part in (self._patches, *self._segments, *self._routers):
            part.session.close()


class _Part:
    """A graph, and which of the values at hand it takes."""

    def __init__(self, session: OnnxSession) -> None:
        self.session = session
        self._names = session.input_names()

    def run(self, images: Feeds, parameters: Mapping[str, NDArray[Any]] = NONE) -> Feeds:
        return self.session.run(
            {name: images[name] if name in images else parameters[name] for name in self._names}
        )


def _own_stacks(files: MappedFiles, manifest: Manifest) -> Feeds:
    """Bases of all tasks by input, those that lie in no table. [T, R, D]"""
    sides = {f"left.{matrix.name}": matrix.u_t for matrix in all_matrices(manifest)}
    sides |= {f"right.{matrix.name}": matrix.vh for matrix in all_matrices(manifest)}
    return {name: files.array(side) for name, side in sides.items() if side.stride is None}


def _shared_by_both_passes(files: MappedFiles, manifest: Manifest) -> Feeds:
    """Tables of bases [T*n, D], and what each direction of each matrix is multiplied with [T, 1, sum R], by input."""
    assert manifest.one_task is not None
    arrays = {f"bases.{index}": files.array(table) for index, table in enumerate(manifest.one_task.bases)}
    scales = []
    for matrix in all_matrices(manifest):
        scale = files.array(matrix.s)
        for rows in (matrix.u_scale, matrix.vh_scale):
            if rows is not None:  # int8: the graph multiplies bare steps
                scale = scale * files.array(rows)
        scales.append(scale)
    return arrays | {"scales": np.concatenate(scales, axis=1)[:, None]}


def _convolutions(files: MappedFiles, tables: VectorTables) -> list[Feeds]:
    """Each task's patch convolution, and the base's if it is there, as inputs."""
    if tables.conv1 is None:
        return []
    stored = {"conv1": tables.conv1, "conv1_scale": tables.conv1_scale}
    arrays = {name: files.array(array) for name, array in stored.items() if array is not None}
    return [{name: array[row] for name, array in arrays.items()} for row in range(tables.conv1.shape[0])]
