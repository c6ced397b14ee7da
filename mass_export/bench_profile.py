"""ONNX Runtime's own profile of a session: which operators ran, in which order, for how long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import onnxruntime

from runtime.onnx_session import OnnxSession


@contextmanager
def profiled(directory: Path) -> Iterator[None]:
    """Sessions that are opened meanwhile keep a profile, each in a file of its own in the directory."""
    original, numbers = onnxruntime.SessionOptions, count()

    def options() -> Any:
        made = original()
        made.enable_profiling, made.profile_file_prefix = True, str(directory / f"profile{next(numbers)}")
        return made

    onnxruntime.SessionOptions = options
    try:
        yield
    finally:
        onnxruntime.SessionOptions = original


def operator_runs(session: OnnxSession) -> list[dict[str, Any]]:
    """End the session's profile: its operators' runs in order, with `name`, `dur` in microseconds and `args`."""
    file = Path(session._session.end_profiling())  # noqa: SLF001 - what is there is there for this
    events = json.loads(file.read_text(encoding="utf-8"))
    return [
        event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
