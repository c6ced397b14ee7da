"""Classify image files: `python -m runtime BUNDLE IMAGE...`."""

from __future__ import annotations

import argparse
import json
import sys
import typing
from collections.abc import Sequence

from runtime.classifier import Classifier
from runtime.errors import MassRuntimeError
from runtime.prediction import Prediction
from runtime.provider import Provider


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime",
        description="Classify images with a mass-export bundle.",
        epilog="example: python -m runtime engines/ cat.jpg --task animals --json",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="directory that mass-export wrote")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument(
        "--task", action="append", metavar="NAME", dest="tasks", help="only this task may answer; repeatable"
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="labels for each image (default 5)")
    parser.add_argument("--provider", choices=typing.get_args(Provider), default="auto")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    return parser


def _table(images: Sequence[str], predictions: Sequence[Prediction]) -> str:
    rows = [("image", "task", "label", "score", "next")]
    for image, found in zip(images, predictions, strict=True):
        further = ", ".join(f"{label} {score:.3f}" for _, label, score in found.alternatives[1:])
        rows.append((image, found.task, found.label, f"{found.score:.3f}", further))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one `error:` line (2 for wrong usage)."""
    arguments = _parser().parse_args(argv)
    try:
        with Classifier(arguments.bundle, arguments.provider) as classifier:
            predictions = classifier.predict(arguments.images, arguments.tasks, arguments.top_k)
    except MassRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        named = zip(arguments.images, predictions, strict=True)
        print(json.dumps([{"image": image, **found.to_dict()} for image, found in named], indent=1))
    else:
        print(_table(arguments.images, predictions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
