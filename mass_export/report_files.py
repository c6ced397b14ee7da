"""Files of scores: read with a check, written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mass_export.errors import ReportError

MAX_REPORT_BYTES = 256 << 20


def read_report(path: Path) -> dict[str, Any]:
    """Read the scores of suites that the demo wrote.

    Raises:
        ReportError: no such file, or not such a report.
    """
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ReportError(f"{path}: larger than {MAX_REPORT_BYTES} bytes; not a report.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(f"{path}: no such file; give the report.json that the demo wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{path}: not a JSON report ({error}).") from error
    if not isinstance(data, dict) or not isinstance(data.get("suites"), list) or not data["suites"]:
        raise ReportError(f'{path}: not a report of the demo (no list of "suites").')
    missing = [name for name in data["suites"] if not isinstance(data.get(name), dict)]
    if missing:
        raise ReportError(f"{path}: the suite(s) {', '.join(map(str, missing))} are missing.")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data as JSON.

    Raises:
        ReportError: the file cannot be written.
    """
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there.

    Raises:
        ReportError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            staged = Path(scratch) / path.name
            staged.write_text(text, encoding="utf-8")
            staged.replace(path)
    except OSError as error:
        raise ReportError(f"{path}: cannot be written ({error.strerror}).") from error
