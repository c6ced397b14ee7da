"""A build's steps for a bar, and Ctrl-C the other way."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

POLL_S = 0.1
BAR_WIDTH = 30

Show = Callable[[str, int, int], None]


def make_monitor(trt: Any, show: Show) -> Any:
    """TensorRT's progress monitor: shows its current phase; `stop()` cancels the build."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._steps: dict[str, int] = {}
            self._stopped = threading.Event()

        def stop(self) -> None:
            self._stopped.set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self._steps[phase_name] = num_steps
            show(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            show(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return not self._stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def run_cancellably(build: Callable[[], Any], monitor: Any) -> Any:
    """Run the build in a thread, so that Ctrl-C reaches this one; TensorRT must not see a Python exception."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(build())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            done.set_exception(error)

    worker = threading.Thread(target=run, name="engine-build", daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(POLL_S)
    except BaseException:
        monitor.stop()
        worker.join()
        raise
    return done.result()


@contextmanager
def terminal_bar(description: str) -> Iterator[Show]:
    """A bar with the time on stderr, without any library; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _now, _step, _steps: None
        return
    start = time.perf_counter()

    def show(now: str, step: int, steps: int) -> None:
        filled = BAR_WIDTH * step // max(steps, 1)
        elapsed_s = time.perf_counter() - start
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        sys.stderr.write(f"\r\x1b[K{description} [{bar}] {elapsed_s:.0f} s  {now[:40]}")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
