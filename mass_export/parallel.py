"""One function over many items, on all processors: an item each, instead of all of them on one item.

Decompositions of a few hundred rows do not split well, and on a busy machine the threads that share one mostly wait
for each other. With one thread for each item the results also do not depend on the number of processors.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Results in the order of the items; at most as many are computed at a time as torch has threads.

    Args:
        function: releases the GIL for most of its time, as torch and numpy do in large operations.
        items: what it is called with.
    """
    threads = torch.get_num_threads()

    def alone(item: T) -> R:
        torch.set_num_threads(1)  # for this thread of the pool
        return function(item)

    try:
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
            yield from pool.map(alone, items)
    finally:
        torch.set_num_threads(threads)
        _return_freed_memory()


def _return_freed_memory() -> None:
    """To the system. What threads free stays in pools of their own, which glibc never empties by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
