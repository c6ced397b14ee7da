"""What TensorRT says while it builds: errors for the message, steps for the bar, and Ctrl-C the other way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from mass_export.engine_settings import TensorRt
from mass_export.errors import shortened

POLL_S = 0.1


def make_logger(tensorrt: TensorRt) -> Any:
    """A logger that keeps errors for the message of the exception."""
    trt: Any = tensorrt.module
    base: Any = trt.ILogger

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def text(self) -> str:
            return shortened(self.errors, limit=3, separator=" | ") or "it gave no reason"

    return Log()


def make_monitor(tensorrt: TensorRt, show: Callable[[str, int, int], None]) -> Any:
    """TensorRT's progress monitor: shows its current phase; `stop()` cancels the build."""
    base: Any = tensorrt.module.IProgressMonitor

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
