"""Processor time of the passes of an fp32 bundle and its int8 copy, as multiples of the plain fp32 pass.

One thread each, in turns: for machines that are busy. The second pass has one task for the whole batch.

    python scripts/bench_parts.py build/t20/bundle build/t20/int8 --batch 1
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import click
import numpy as np

from mass_export.bench import interleave, random_images
from mass_export.bench_plain import write_plain_pass
from runtime.bundle import FIRST_PASS
from runtime.manifest import read_manifest
from runtime.one_task import OneTaskPass
from runtime.onnx_session import OnnxSession

FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command(help=__doc__)
@click.argument("fp32", type=FOLDER)
@click.argument("int8", type=FOLDER)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(fp32: Path, int8: Path, batch: int, rounds: int) -> None:
    """Time and print."""
    with tempfile.TemporaryDirectory() as scratch:
        images = random_images(read_manifest(fp32), batch, seed=0)
        feeds = {"pixel_values": images}
        calls = {"plain": partial(OnnxSession(write_plain_pass(fp32, Path(scratch)), "cpu", 1).run, feeds)}
        for name, bundle in (("fp32", fp32), ("int8", int8)):
            manifest = read_manifest(bundle)
            if manifest.one_task is None:
                raise click.ClickException(f"{bundle}: has no one-task graph; export it as fp32 or int8.")
            second = OneTaskPass(bundle, manifest, 1)
            if second.routes:
                calls[f"{name} first"] = partial(second.first_pass, images)
            else:
                first = OnnxSession(bundle / manifest.passes[FIRST_PASS].file, "cpu", 1)
                calls[f"{name} first"] = partial(first.run, feeds)
            calls[f"{name} second"] = partial(second.run, images, [0])
        times = interleave(calls, rounds, 1, clock=time.thread_time)
    for name in ("fp32", "int8"):
        times[f"{name} both"] = times[f"{name} first"] + times[f"{name} second"]
    for name, ms in times.items():
        low, high = np.percentile(ms, [10, 90])
        ratio = np.median(ms / times["plain"])
        click.echo(f"{name:12} {np.median(ms):8.1f} ms ({low:.1f} to {high:.1f})  {ratio:.2f} of plain")


if __name__ == "__main__":
    main()
