"""Factors of single tasks on the disk, so that an interrupted merge goes on where it stopped.

A file's name is the hash of everything that its content follows from: the checkpoints' own hashes and the settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mass_export.artifact import TaskFactors
from mass_export.low_rank import LowRank
from mass_export.safetensors_writer import write_safetensors

_VERSION = 1  # of the arithmetic: raised when the same inputs give other factors


class FactorCache:
    """A directory of factors.

    Args:
        directory: made when the first task is stored.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def key(self, **content: Any) -> str:
        """Name of what these inputs and settings give."""
        text = json.dumps({"version": _VERSION, **content}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self, key: str) -> tuple[TaskFactors, dict[str, Tensor]] | None:
        """Factors and router bases, or None when they are not there in full."""
        path = self._directory / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            file = cast("Any", safe_open(path, framework="pt"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        groups: dict[str, dict[str, Tensor]] = {"u": {}, "s": {}, "vh": {}, "vector": {}, "router": {}}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition(":")
            groups[kind][parameter] = tensor
        matrices = {
            name: LowRank(groups["u"][name], groups["s"][name], groups["vh"][name]) for name in groups["s"]
        }
        return TaskFactors(matrices, groups["vector"]), groups["router"]

    def store(self, key: str, factors: TaskFactors, router_bases: dict[str, Tensor]) -> None:
        """Keep a task's factors."""
        self._directory.mkdir(exist_ok=True)
        tensors = {f"vector:{name}": delta for name, delta in factors.vectors.items()}
        for name, matrix in factors.matrices.items():
            tensors |= {f"{part}:{name}": tensor for part, tensor in vars(matrix).items()}
        tensors |= {f"router:{name}": basis for name, basis in router_bases.items()}
        write_safetensors(self._directory / f"{key}.safetensors", tensors, {})

    def clear(self) -> None:
        """Remove the directory: the merge is complete."""
        shutil.rmtree(self._directory, ignore_errors=True)
