"""What a set of several tasks costs before its first image: its cores, computed once and kept.

python scripts/bench_cores.py build/t8/bundle build/t20/bundle
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from mass_export.tables import Table
from runtime.cores import CoreCache
from runtime.manifest import read_manifest

ROUNDS = 5
HITS = 1000


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(bundles: tuple[Path, ...]) -> None:
    """Time misses and hits of the cores' cache; medians over different sets."""
    rows = []
    for bundle in bundles:
        manifest = read_manifest(bundle)
        T = len(manifest.tasks)
        for size in (1, 2, 3):
            cores = CoreCache(bundle, manifest.matrices, ROUNDS)
            sets = [tuple(sorted((i + k) % T for k in range(size))) for i in range(ROUNDS)]
            misses = []
            for tasks in sets:
                start = time.perf_counter()
                found = cores.get(tasks)
                misses.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(HITS):
                cores.get(sets[-1])
            hit_us = (time.perf_counter() - start) / HITS * 1e6
            nbytes = sum(core.nbytes for core in found.values())
            rows.append(
                (
                    str(bundle),
                    str(T),
                    str(size),
                    f"{1000 * np.median(misses):.0f}",
                    f"{hit_us:.1f}",
                    f"{nbytes / 1e6:.1f}",
                )
            )
    columns = ("Bundle", "T", "Tasks in the set", "Miss, ms", "Hit, us", "Kept, MB")
    click.echo(Table("Cores", columns, tuple(rows)).to_markdown())


if __name__ == "__main__":
    main()
