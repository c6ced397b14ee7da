"""What TensorRT says: errors are kept for the next exception, warnings go to `logging`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

_LOG = logging.getLogger(__name__)


def make_logger(trt: Any) -> Any:
    """A logger for a module, TensorRT or TensorRT-RTX: `errors` are what it said, `text()` is for messages."""
    base: Any = trt.ILogger

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.ERROR, base.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == base.WARNING:
                _LOG.info("%s", message)

        def text(self) -> str:
            return first_few(self.errors, " | ") or "no reason was given"

    return Log()


def first_few(texts: Sequence[str], separator: str = ", ", limit: int = 3) -> str:
    """The first of many texts, and how many more there are."""
    more = f"{separator}and {len(texts) - limit} more" if len(texts) > limit else ""
    return separator.join(texts[:limit]) + more
