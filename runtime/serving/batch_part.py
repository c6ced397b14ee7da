"""One part of a batch job: from its images to its Parquet file, a batch in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.errors import InputError
from runtime.prediction import Prediction
from runtime.preprocess import pixel_values_from_images
from runtime.serving.batch_inputs import Part, read_part
from runtime.serving.engine import Engine, Work
from runtime.serving.images import image_from_bytes
from runtime.serving.service import answer_from_prediction

ROW_GROUP = 1000


def part_schema(tasks: Sequence[str]) -> pa.Schema:
    """One row for each image; either `error` or the rest is null."""
    by_task = pa.struct([(task, pa.float32()) for task in tasks])
    alternative = pa.struct([("task", pa.string()), ("label", pa.string()), ("score", pa.float64())])
    return pa.schema(
        [
            ("image", pa.string()),
            ("error", pa.string()),
            ("task", pa.string()),
            ("label", pa.string()),
            ("score", pa.float64()),
            ("alternatives", pa.list_(alternative)),
            ("gates", by_task),
            ("residuals", by_task),
            ("route_margin", pa.float64()),
            ("route_confidence", pa.float64()),
            ("unknown", pa.float64()),
            ("is_unknown", pa.bool_()),
        ]
    )


def write_part(
    engine: Engine,
    part: Part,
    out: Path,
    *,
    tasks: tuple[str, ...] | None,
    top_k: int,
    batch_size: int,
    max_pixels: int,
) -> tuple[int, int]:
    """Classify a part into a Parquet file, which gets its name when it is whole.

    Returns:
        images, and how many of them could not be read
    """
    schema = part_schema(engine.tasks)
    rows = errors = 0
    waiting: list[dict[str, Any]] = []
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for batch in _batches(read_part(part), batch_size):
                answers = _answers(engine, batch, tasks, top_k, max_pixels)
                rows += len(answers)
                errors += sum(answer["error"] is not None for answer in answers)
                waiting += answers
                if len(waiting) >= ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(waiting, schema))
                    waiting = []
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows, errors


def _batches(
    images: Iterator[tuple[str, bytes | InputError]], size: int
) -> Iterator[list[tuple[str, bytes | InputError]]]:
    while batch := list(islice(images, size)):
        yield batch


def _answers(
    engine: Engine,
    batch: Sequence[tuple[str, bytes | InputError]],
    tasks: tuple[str, ...] | None,
    top_k: int,
    max_pixels: int,
) -> list[dict[str, Any]]:
    pixels, found = [], []
    for name, content in batch:
        answer: dict[str, Any] = {"image": name, "error": None}
        try:
            if isinstance(content, InputError):
                raise content
            image = image_from_bytes(content, "image", max_pixels)
            pixels.append(pixel_values_from_images([image], engine.classifier.manifest.preprocess))
        except InputError as error:
            answer["error"] = str(error)
        found.append(answer)
    predictions: Iterator[Prediction] = iter(())
    if pixels:
        predictions = iter(engine.run([Work(np.concatenate(pixels), tasks, top_k)])[0])
    for answer in found:
        if answer["error"] is None:
            answer.update(answer_from_prediction(answer["image"], next(predictions)))
    return found
