"""`batch`: classify any number of images on Ray Data; every image is one row, exactly once, whatever dies meanwhile.

The input is cut into parts. A worker writes each part to a file of its own beside the output, which gets its name when
it is whole; a part that died with its worker is done again by another, and one that is there is not done again. At the
end the parts become the one output file. So a job that was killed goes on where it was when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.serving.batch_inputs import Part, plan_parts, total_rows
from runtime.serving.engine import Engine, bundle_digest
from runtime.serving.server import check_bundle, ray_cluster
from runtime.serving.settings import BatchSettings

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class BatchResult:
    """What was done: images in the output, errors among them, parts that were there already, seconds."""

    images: int
    errors: int
    parts: int
    kept_parts: int
    elapsed_s: float

    def sentence(self, output: str) -> str:
        """For the command line."""
        kept = f", {self.kept_parts} of {self.parts} parts were there" if self.kept_parts else ""
        images = f"{self.images} images, {self.errors} of them unreadable"
        return f"Wrote {output}: {images}, in {self.elapsed_s:.1f} s{kept}"


class PartWorker:
    """An actor of Ray Data: holds one classifier and turns parts into files."""

    def __init__(self, settings: BatchSettings, directory: str) -> None:
        """Load the bundle."""
        self._settings = settings
        self._directory = Path(directory)
        self._engine = Engine(
            settings.bundle,
            provider=settings.provider,
            threads=settings.worker_threads(),
            batch_size=settings.batch_size,
        )
        self._tasks = self._engine.known_tasks(settings.task_names)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the parts of a batch, by number; rows and errors of each."""
        done = [self._do(int(number)) for number in batch["part"]]
        return {"rows": [rows for rows, _ in done], "errors": [errors for _, errors in done]}

    def _do(self, number: int) -> tuple[int, int]:
        part = Part.from_dict(json.loads(_input_file(self._directory, number).read_text()))
        return write_part_file(
            self._engine, part, _part_file(self._directory, number), self._settings, self._tasks
        )


def write_part_file(
    engine: Engine, part: Part, out: Path, settings: BatchSettings, tasks: tuple[str, ...] | None
) -> tuple[int, int]:
    """See `runtime.serving.batch_part.write_part`."""
    from runtime.serving.batch_part import write_part  # noqa: PLC0415 - pyarrow is of the extra

    return write_part(
        engine,
        part,
        out,
        tasks=tasks,
        top_k=settings.top_k,
        batch_size=settings.batch_size,
        max_pixels=settings.max_pixels,
    )


def run_batch(settings: BatchSettings) -> BatchResult:
    """Classify the whole input; a job that was interrupted goes on.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        InputError: nothing to read, or the parts that are there belong to another job.
    """
    start = time.perf_counter()
    check_bundle(settings.bundle)
    output = Path(settings.output)
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output}: expected a file in a folder that exists.")
    parts = plan_parts(settings.input, settings.column, settings.chunk)
    directory = output.with_name(f"{output.name}.parts").absolute()
    _prepare(directory, settings, parts)
    missing = [number for number in range(len(parts)) if not _part_file(directory, number).exists()]
    if missing:
        _run(settings, directory, missing)
    images, errors = merge_parts(directory, len(parts), output, total_rows(parts))
    shutil.rmtree(directory)
    elapsed_s = time.perf_counter() - start
    return BatchResult(images, errors, len(parts), len(parts) - len(missing), elapsed_s)


def merge_parts(directory: Path, count: int, output: Path, expected: int | None) -> tuple[int, int]:
    """Write the parts, in order, as one file, a row group in memory at a time; images and errors."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    rows = errors = 0
    unfinished = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(unfinished, pq.read_schema(_part_file(directory, 0))) as writer:
            for number in range(count):
                part = pq.ParquetFile(_part_file(directory, number))
                for group in range(part.num_row_groups):
                    table = part.read_row_group(group)
                    rows += table.num_rows
                    errors += table.num_rows - table.column("error").null_count
                    writer.write_table(table)
        if expected is not None and rows != expected:
            raise InputError(
                f"{directory}: {rows} rows, the input has {expected}; remove the folder, start again."
            )
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows, errors


def _prepare(directory: Path, settings: BatchSettings, parts: list[Part]) -> None:
    """Write the plan, or see that it is the one that is there."""
    lines = [json.dumps(part.to_dict()) for part in parts]
    plan = {
        "bundle": bundle_digest(settings.bundle),
        "tasks": settings.tasks,
        "top_k": settings.top_k,
        "max_pixels": settings.max_pixels,
        "inputs": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }
    file = directory / PLAN_FILE
    if file.exists():
        there = json.loads(file.read_text())
        differing = sorted(key for key, value in plan.items() if there.get(key) != value)
        if differing:
            raise InputError(
                f"{directory}: parts of another job are there ({', '.join(differing)} differ); finish it with the "
                "command that began it, or remove the folder."
            )
        return
    directory.mkdir(exist_ok=True)
    for number, line in enumerate(lines):
        _input_file(directory, number).write_text(line)
    file.write_text(json.dumps(plan))


def _run(settings: BatchSettings, directory: Path, missing: list[int]) -> None:
    with ray_cluster(settings.address):
        import ray.data  # noqa: PLC0415

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = not settings.quiet
        context.print_on_execution_start = False
        work = ray.data.from_items([{"part": number} for number in missing], override_num_blocks=len(missing))
        done = work.map_batches(
            PartWorker,
            fn_constructor_kwargs={"settings": settings, "directory": str(directory)},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(settings.workers, len(missing))),
            num_cpus=settings.worker_threads() if settings.address else 0.5,
        )
        for _ in done.iter_batches(batch_size=None, prefetch_batches=0):
            pass


def _input_file(directory: Path, number: int) -> Path:
    return directory / f"part-{number:06}.json"


def _part_file(directory: Path, number: int) -> Path:
    return directory / f"part-{number:06}.parquet"
