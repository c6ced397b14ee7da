"""Cores of task sets that stay on the GPU: uploaded once for each set, put together there for each batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from runtime.cores import CoreCache, Cores
from runtime.cuda_memory import CudaMemory
from runtime.device_array import DeviceArray

_FLOAT32 = np.dtype(np.float32)


class DeviceCores:
    """The cores of the sets seen last, on the device; at most `max_sets` of them.

    All cores of one set lie behind each other, those of equal size together. A batch of one set uses them where
    they lie. A batch of many sets needs them by matrix, `[S, K*R, K*R]`: one strided copy for each sample and size.
    """

    def __init__(self, memory: CudaMemory, max_sets: int) -> None:
        self._memory = memory
        self._max_sets = max_sets
        self._blocks: OrderedDict[tuple[int, ...], DeviceArray] = OrderedDict()

    def feeds(self, sets: Sequence[tuple[int, ...]], cores: CoreCache) -> dict[str, DeviceArray]:
        """Inputs of the second pass.

        Args:
            sets: of equal size; one for the batch, or one for each sample.
            cores: computes what is not on the device yet.

        Returns:
            input name -> cores. [S, K*R, K*R] float32
        """
        with self._memory.lock:
            first = cores.get(sets[0])
            names = _ordered(first)
            blocks = [self._block(tasks, cores) for tasks in sets]
            target = blocks[0]
            if len(sets) > 1:
                target = self._memory.allocate((len(sets), *blocks[0].shape), _FLOAT32)
            found, offset = {}, 0
            for side, group in groupby(names, key=lambda name: first[name].shape[0]):
                members, core_bytes = list(group), 4 * side * side
                start = target.address + len(sets) * offset
                if len(sets) > 1:
                    for sample, block in enumerate(blocks):
                        self._memory.copy_blocks(
                            start + sample * core_bytes,
                            len(sets) * core_bytes,
                            block.address + offset,
                            block_bytes=core_bytes,
                            count=len(members),
                        )
                for place, name in enumerate(members):
                    address = start + place * len(sets) * core_bytes
                    shape = (len(sets), side, side)
                    found[name] = DeviceArray(address, shape, _FLOAT32, target.owner, self._memory)
                offset += len(members) * core_bytes
            return found

    def clear(self) -> None:
        """Give the memory back."""
        self._blocks.clear()

    def _block(self, tasks: tuple[int, ...], cores: CoreCache) -> DeviceArray:
        if tasks not in self._blocks:
            found = cores.get(tasks)
            packed = np.concatenate([found[name].ravel() for name in _ordered(found)])
            self._blocks[tasks] = self._memory.upload(packed)
        self._blocks.move_to_end(tasks)
        block = self._blocks[tasks]
        while len(self._blocks) > self._max_sets:
            self._blocks.popitem(last=False)
        return block


def _ordered(cores: Cores) -> list[str]:
    """Names by size, then as they come."""
    return sorted(cores, key=lambda name: cores[name].shape[0])
