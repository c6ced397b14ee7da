"""Progress bars on the terminal: what is being done, how much is left, and how long that will take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

T = TypeVar("T")

_ESTIMATED_FROM_S = 600.0  # steps of the last so many seconds tell the time left; one may take a minute


class Progress:
    """Bars on stderr while items are worked through; nothing when quiet, or when stderr is not a terminal.

    Loops may be nested; the bars of inner loops go when they end, those of outer loops stay.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._visible = not quiet and sys.stderr.isatty()
        self._bars: RichProgress | None = None
        self._depth = 0

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass the items on, with a bar that moves as each is done.

        Args:
            items: what is worked through.
            description: what is being done, such as "Factorising tasks".
            total: the number of items, where `len(items)` does not give it.
        """
        if not self._visible:
            yield from items
            return
        if total is None and isinstance(items, Sized):
            total = len(items)
        bars = self._bars or self._start()
        bar = bars.add_task(description, total=total)
        self._depth += 1
        try:
            for item in items:
                yield item
                bars.advance(bar)
        finally:
            self._depth -= 1
            if self._depth:
                bars.remove_task(bar)
            else:
                bars.stop()
                self._bars = None

    @contextmanager
    def bar(self, description: str) -> Iterator[Callable[[str, int, int], None]]:
        """A bar for work that reports by itself: the yielded function takes (what is done now, step, steps)."""
        if not self._visible:
            yield lambda _now, _step, _steps: None
            return
        bars = self._bars or self._start()
        bar = bars.add_task(description, total=None)
        self._depth += 1

        def show(now: str, step: int, steps: int) -> None:
            bars.update(bar, description=f"{description}: {now}", completed=step, total=steps)

        try:
            yield show
        finally:
            self._depth -= 1
            if self._depth:
                bars.remove_task(bar)
            else:
                bars.stop()
                self._bars = None

    def _start(self) -> RichProgress:
        from rich.console import Console  # noqa: PLC0415 - not needed where nothing is shown
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            speed_estimate_period=_ESTIMATED_FROM_S,
        )
        self._bars.start()
        return self._bars
