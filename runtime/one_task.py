"""The second pass for images of one task on a CPU: the task's parameters go from the mapped file into the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest, OneTaskSpec, map_array
from runtime.session import Session


class OneTaskPass:
    """Runs the one-task graph with any task's parameters; see `runtime.bundle.OneTaskSpec`. Thread-safe."""

    def __init__(self, directory: Path, manifest: Manifest, spec: OneTaskSpec, session: Session) -> None:
        """Map the parameters of all tasks; nothing is read before a task is first run.

        Args:
            directory: of the bundle.
            manifest: of the bundle.
            spec: its `one_task`.
            session: of its graph.
        """
        self._session = session
        arrays: dict[str, NDArray[Any]] = {}
        for matrix in manifest.matrices:
            parts = {"right": matrix.vh, "scale": matrix.s, "left": matrix.u_t}
            arrays |= {f"{kind}.{matrix.name}": map_array(directory, array) for kind, array in parts.items()}
            for scale in (matrix.u_scale, matrix.vh_scale):
                if scale is not None:  # int8: the graph multiplies bare steps
                    key = f"scale.{matrix.name}"
                    arrays[key] = arrays[key] * map_array(directory, scale)
        if spec.tables is not None:
            arrays["vectors"] = map_array(directory, spec.tables.vectors)
            arrays["conv1"] = map_array(directory, spec.tables.conv1)
            if spec.tables.conv1_scale is not None:
                arrays["conv1_scale"] = map_array(directory, spec.tables.conv1_scale)
        self._feeds = [
            {name: np.asarray(array[task]) for name, array in arrays.items()}
            for task in range(len(manifest.tasks))
        ]

    def run(self, pixel_values: Any, task: int) -> NDArray[np.float32]:
        """Logits of every head under one task's model.

        Args:
            pixel_values: normalised images. [B, 3, H, W] float32
            task: index.

        Returns:
            logits: tasks in order. [B, sum C] float32

        Raises:
            BackendError: the session failed.
        """
        logits: NDArray[np.float32] = self._session.run({"pixel_values": pixel_values} | self._feeds[task])[
            "logits"
        ]
        return logits

    def close(self) -> None:
        """Release the graph."""
        self._session.close()
