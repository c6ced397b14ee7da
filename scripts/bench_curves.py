"""The figures of docs/speed.md: time by number of tasks, precision, routing layer and size of sets, with a picture.

    pip install -e ".[study]"
    python scripts/bench_curves.py --work build/bench --out docs

Random ViT-B/32 artifacts of constant total rank (1/T each) are made in the work directory, 24 GB, and kept. Each bundle
takes turns with the plain pass, so that what else the machine does hits both alike; no two are open at once, for their
tasks would push each other out of memory. All are visited several times, so that a slow minute of the machine does not
hit one of them alone. Leave it alone meanwhile; with the defaults it takes about 45 minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
from bench_material import make_bundle
from numpy.typing import NDArray

from mass_export.bench import BenchSettings, Call, bench_bundle, interleave, random_images, two_passes
from mass_export.bench_plain import write_plain_pass
from mass_export.machine import describe_machine
from mass_export.progress import Progress
from mass_export.spec import PatchEmbed
from runtime.bundle import ImageDtype
from runtime.classifier import Classifier
from runtime.engine_spec import Precision
from runtime.manifest import read_manifest
from runtime.onnx_session import OnnxSession

mpl.use("svg")
from matplotlib import pyplot as plt

COUNTS = (8, 20, 50, 100)
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
EARLY = 5
OWN_FIRST_PASS = ("t8-fp32", "t20-fp32")  # timed with a first pass of its own, too


@dataclasses.dataclass(frozen=True)
class Material:
    """A bundle of random tasks."""

    tasks: int
    precision: Precision = "fp32"
    layer: int | None = None
    patch_embed: PatchEmbed = "full"
    router_precision: Precision | None = None
    image_dtype: ImageDtype = "float32"

    @property
    def name(self) -> str:
        """Of its folder."""
        kinds = {
            "-patches": self.patch_embed == "low_rank",
            f"-block{self.layer}": self.layer is not None,
            "-router8": self.router_precision is not None,
            "-bytes": self.image_dtype == "uint8",
        }
        return f"t{self.tasks}-{self.precision}" + "".join(kind for kind, is_so in kinds.items() if is_so)

    def make(self, work: Path, model: str) -> Path:
        """The bundle, made if it is not there; its artifact lies beside it."""
        artifact_file, bundle = work / f"{self.name}.safetensors", work / self.name
        if bundle.is_dir():
            return bundle
        make_bundle(
            model,
            self.tasks,
            artifact_file,
            bundle,
            layer=self.layer,
            precision=self.precision,
            patch_embed=self.patch_embed,
            router_precision=self.router_precision,
            image_dtype=self.image_dtype,
        )
        return bundle


MATERIAL = (
    *(Material(T) for T in COUNTS),
    *(Material(T, "int8") for T in (8, 20)),
    *(Material(20, precision, patch_embed="low_rank") for precision in PRECISIONS),
    Material(20, layer=EARLY),
    Material(20, "fp16"),
    Material(20, router_precision="int8"),
    *(Material(20, precision, image_dtype="uint8") for precision in PRECISIONS),
)


def calls_of(
    classifier: Classifier, name: str, batch: int, *, shared: bool
) -> Iterator[tuple[tuple[str, str], Call]]:
    """What is timed, by material and kind."""
    images, T = random_images(classifier.manifest, batch, seed=0), len(classifier.tasks)
    mixed = [(row % T,) for row in range(batch)]
    if not shared:
        yield (name, "mixed, first pass of its own"), partial(two_passes, classifier, images, mixed)
        return
    yield (name, "mixed"), partial(two_passes, classifier, images, mixed)
    yield (name, "one task"), partial(two_passes, classifier, images, [(0,)] * batch)
    yield (name, "known task"), partial(classifier.forward, images, tasks=[classifier.tasks[0]])


def measure(
    work: Path, model: str, batches: tuple[int, ...], sweeps: int, rounds: int, progress: Progress
) -> list[dict[str, Any]]:
    """Milliseconds and ratios to the plain pass, by material, kind and batch."""
    bundles = {m.name: m.make(work, model) for m in progress.track(MATERIAL, "Making bundles")}
    found: dict[tuple[str, str, int], list[NDArray[np.float64]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        first = next(iter(bundles.values()))
        plain = {
            kind: OnnxSession(write_plain_pass(first, Path(scratch), trimmed=kind == "trimmed"), "cpu")
            for kind in ("plain", "trimmed")
        }
        for name, bundle in progress.track(list(bundles.items()) * sweeps, "Timing"):
            with ExitStack() as stack:
                kinds = (True, False) if name in OWN_FIRST_PASS else (True,)
                opened = {
                    shared: stack.enter_context(
                        Classifier(bundle, "cpu", verify="size", mode="top1", share_base=shared)
                    )
                    for shared in kinds
                }
                for batch in batches:
                    images = random_images(read_manifest(first), batch, seed=0)
                    calls: dict[tuple[str, str], Call] = {
                        ("plain", kind): partial(session.run, {"pixel_values": images})
                        for kind, session in plain.items()
                    }
                    for shared, classifier in opened.items():
                        calls |= dict(calls_of(classifier, name, batch, shared=shared))
                    times = interleave({"|".join(key): call for key, call in calls.items()}, rounds, 1)
                    base = times["plain|plain"]
                    for key, ms in times.items():
                        what, kind = key.split("|")
                        found.setdefault((what, kind, batch), []).append(np.stack([ms, ms / base]))
    return [row_of(*key, *np.concatenate(parts, axis=1)) for key, parts in found.items()]


def row_of(
    what: str, kind: str, batch: int, ms: NDArray[np.float64], ratios: NDArray[np.float64]
) -> dict[str, Any]:
    """A row of the results."""
    low, middle, high = np.percentile(ratios, [10, 50, 90]).tolist()
    return {
        "what": what,
        "kind": kind,
        "batch": batch,
        "ms_median": float(np.median(ms)),
        "ratio": middle,
        "ratio_p10": low,
        "ratio_p90": high,
        "count": len(ms),
    }


def draw(results: dict[str, Any], out: Path) -> None:
    """Time by T, by batch, and against the reference."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3))
    rows = results["rows"]

    def ratio(what: str, kind: str, batch: int) -> float:
        return next(r["ratio"] for r in rows if (r["what"], r["kind"], r["batch"]) == (what, kind, batch))

    batches = sorted({row["batch"] for row in rows})
    for kind, marker in (("mixed", "o"), ("one task", "s"), ("known task", "^")):
        left.plot(COUNTS, [ratio(f"t{T}-fp32", kind, batches[1]) for T in COUNTS], marker=marker, label=kind)
    left.set(
        xlabel="tasks, constant total rank",
        ylabel="multiple of a plain fp32 pass",
        title=f"fp32, batch {batches[1]}",
    )
    left.set_xscale("log")
    left.set_xticks(COUNTS, [str(T) for T in COUNTS])
    left.minorticks_off()
    left.set_ylim(0)
    left.legend(frameon=False)
    for name, label in (
        ("t20-fp32", "fp32"),
        (f"t20-fp32-block{EARLY}", f"fp32, block {EARLY}"),
        ("t20-int8", "int8"),
    ):
        middle.plot(batches, [ratio(name, "mixed", b) for b in batches], marker="o", label=label)
    middle.set(xlabel="batch", title="T = 20, mixed tasks")
    middle.set_xscale("log", base=2)
    middle.set_xticks(batches, [str(b) for b in batches])
    middle.set_ylim(0)
    middle.legend(frameon=False)
    reference = {row["what"]: row["ratio_to_plain_fp32"] for row in results["reference"]["rows"]}
    shown = (
        "two_pass_top1_mixed",
        "two_pass_set2",
        "two_pass_set3",
        "eager",
        "reference_cached",
        "reference_uncached",
    )
    names = [name for name in shown if name in reference]
    right.barh(names[::-1], [reference[name] for name in names[::-1]])
    right.set(
        title=f"T = 20, batch {results['reference']['rows'][0]['batch']}",
        xlabel="multiple of a plain fp32 pass",
    )
    right.set_xlim(0)
    fig.tight_layout()
    fig.savefig(out / "speed.svg", metadata={"Date": None})


@click.command(help=__doc__)
@click.option("--work", default=Path("build/bench"), show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default=Path("docs"), show_default=True, type=click.Path(path_type=Path))
@click.option("--model", default="ViT-B-32", show_default=True)
@click.option(
    "--batch", "batches", multiple=True, default=(1, 8, 32), show_default=True, type=click.IntRange(1)
)
@click.option("--sweeps", default=3, show_default=True, type=click.IntRange(1), help="Visits of each bundle.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Calls at each visit.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(
    work: Path, out: Path, model: str, batches: tuple[int, ...], sweeps: int, rounds: int, *, quiet: bool
) -> None:
    """Write speed.json and speed.svg, print the rows."""
    work.mkdir(parents=True, exist_ok=True)
    progress = Progress(quiet=quiet)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "rows": measure(work, model, batches, sweeps, rounds, progress),
    }
    settings = BenchSettings(batches=(max(batches),), rounds=3, warmup=1, longest_s=120)
    name = Material(20).name
    results["reference"] = bench_bundle(work / name, work / f"{name}.safetensors", settings, progress)
    (out / "speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, out)
    for row in results["rows"]:
        click.echo(
            f"{row['what']:16} {row['kind']:29} {row['batch']:3} {row['ms_median']:8.1f} ms  {row['ratio']:.2f} "
            f"({row['ratio_p10']:.2f} to {row['ratio_p90']:.2f})"
        )
    for row in results["reference"]["rows"]:
        click.echo(
            f"{row['what']:40} {row['batch']:3} {row['ms_median']:8.1f} ms  {row['ratio_to_plain_fp32']:.2f}"
        )


if __name__ == "__main__":
    main()
