"""`batch` over many images, with a worker killed in the middle, then everything, then started again.

    python scripts/load_batch.py --bundle engines/ --data examples/zoo --out docs/serving

Writes OUT/batch.json. The images are the data's test images, repeated under new names; every hundredth is damaged.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
from load_test import encoded_images, memory_mib, save

WORKER = b"ray::MapWorker"


def write_images(data: Path, folder: Path, count: int) -> int:
    """Files in folders of a thousand; how many of them are damaged."""
    contents = [content for _, content in encoded_images(data, 8000)]
    for number in range(count):
        directory = folder / f"{number // 1000:04}"
        if number % 1000 == 0:
            directory.mkdir(parents=True)
        content = contents[number % len(contents)]
        (directory / f"{number:07}.png").write_bytes(content[:80] if number % 100 == 50 else content)
    return len(range(50, count, 100))


def processes() -> dict[int, bytes]:
    """Command lines by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
    return found


def family(root: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents = {}
    for pid in processes():
        try:
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def workers() -> list[int]:
    """Ray Data's actors."""
    return [pid for pid, command in processes().items() if WORKER in command]


def until(process: subprocess.Popen[bytes], happens: Callable[[], bool], memory: list[float]) -> bool:
    """Wait, writing down the workers' memory; False if the job ended before."""
    while process.poll() is None:
        memory.append(memory_mib(workers()))
        if happens():
            return True
        time.sleep(0.5)
    return False


@click.command(help=__doc__)
@click.option("--bundle", required=True, type=click.Path(path_type=Path))
@click.option("--data", default=Path("examples/zoo"), type=click.Path(path_type=Path))
@click.option("--out", default=Path("docs/serving"), type=click.Path(path_type=Path))
@click.option("--images", default=100_000, show_default=True)
@click.option("--workers", "count", default=2, show_default=True)
def main(bundle: Path, data: Path, out: Path, images: int, count: int) -> None:
    """See the module."""
    scratch = Path(tempfile.mkdtemp(prefix="load-batch-"))
    damaged = write_images(data, scratch / "images", images)
    output, parts = scratch / "out.parquet", scratch / "out.parquet.parts"
    command = [
        sys.executable, "-m", "runtime.serving", "batch", "--bundle", str(bundle), "--input", str(scratch / "images"),
        "--output", str(output), "--workers", str(count), "--threads", "1", "--chunk", "1000", "--quiet",
    ]  # fmt: skip
    total = -(-images // 1000)

    def done() -> int:
        return len(list(parts.glob("part-*.parquet")))

    memory: list[float] = []
    start = time.perf_counter()
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert until(first, lambda: done() >= total // 4, memory)
    victim = workers()[0]
    os.kill(victim, signal.SIGKILL)
    at_kill = done()
    assert until(first, lambda: done() >= total // 2, memory)
    ours = family(first.pid)
    for pid in ours:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    first_s, kept = time.perf_counter() - start, done()
    click.echo(f"worker {victim} killed at {at_kill} parts, {len(ours)} processes at {kept}", err=True)
    start = time.perf_counter()
    second = subprocess.Popen(command, stdout=subprocess.PIPE)
    until(second, lambda: False, memory)
    sentence = second.stdout.read().decode().strip() if second.stdout else ""
    second_s = time.perf_counter() - start
    table = pq.read_table(output, columns=["image", "error"])
    result: dict[str, Any] = {
        "images": images,
        "damaged": damaged,
        "workers": count,
        "parts": total,
        "parts_when_a_worker_was_killed": at_kill,
        "parts_when_all_was_killed": kept,
        "first_s": first_s,
        "second_s": second_s,
        "said": sentence.replace(str(scratch), "."),
        "rows": table.num_rows,
        "different_names": len(set(table.column("image").to_pylist())),
        "errors": table.num_rows - table.column("error").null_count,
        "memory_of_workers_mib": {
            "median": statistics.median(value for value in memory if value),
            "largest": max(memory),
        },
    }
    save(out, "batch", result)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
