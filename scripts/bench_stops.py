"""What early stops of the first pass save in wall time, at full size, by the share of images that stop.

    python scripts/bench_stops.py --model ViT-B-32 --tasks 20

Two bundles of the same random tasks: a discriminant at block 9 that reads all images, and one with stops before blocks
1 and 3. The margin is set so that the given share of random images stops at the first of them. The passes take turns;
figures are medians of ratios to the plain pass.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from bench_material import artifact_of

from mass_export.artifact import Artifact, Calibration
from mass_export.bench import Call, interleave, random_images
from mass_export.bench_plain import write_plain_pass
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.router_spec import CalibrationInfo, Tap
from runtime.classifier import Classifier
from runtime.onnx_session import OnnxSession

LAST, STOPS = 9, (1, 3)


def calibrated(artifact: Artifact, stops: tuple[int, ...]) -> Artifact:
    """With random discriminants that read the mlp inputs up to the last block, and up to those of the stops."""
    T, D = len(artifact.tasks), artifact.info.vision.width
    taps = tuple(Tap(i, "mlp") for i in range(LAST + 1))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(T, len(taps) * D, generator=generator) / D**0.5
    read = torch.zeros(len(stops), T, len(taps) * D)
    for index, stop in enumerate(stops):
        read[index, :, : (stop + 1) * D] = weight[:, : (stop + 1) * D]
    router = artifact.info.router
    table = torch.zeros(len(artifact.info.taps()), T)
    info = CalibrationInfo(
        level="task_images", images={"none": 0}, discriminant=taps, residual_weight=0.0, discriminant_weight=1.0,
        router=router, stops=stops,
    )  # fmt: skip
    calibration = Calibration(
        table,
        table + 1,
        weight,
        torch.zeros(T),
        stop_weight=read if stops else None,
        stop_bias=torch.zeros(len(stops), T) if stops else None,
    )
    return dataclasses.replace(
        artifact, info=dataclasses.replace(artifact.info, calibration=info), calibration=calibration
    )


def set_margin(classifier: Classifier, share: float) -> None:
    """Let so many random images stop at the first stop."""
    part = classifier._one_task  # noqa: SLF001 - the margin is the bundle's; here it is what varies
    assert part is not None
    part._stop_margin = 0.0  # noqa: SLF001 - all stop at the first, whose residuals are wanted
    images = random_images(classifier.manifest, 256, seed=1)
    found = np.concatenate([part.first_pass(images[i : i + 32])["residuals"] for i in range(0, 256, 32)])
    two = np.sort(found, axis=1)[:, :2]
    leads = two[:, 1] - two[:, 0]
    part._stop_margin = float(np.quantile(leads, 1 - share)) if share else np.inf  # noqa: SLF001


@click.command(help=__doc__)
@click.option("--model", default="ViT-B-32", show_default=True)
@click.option("--tasks", "task_count", default=20, show_default=True, type=click.IntRange(2))
@click.option(
    "--batch", "sizes", multiple=True, default=(1, 8, 32), show_default=True, type=click.IntRange(1)
)
@click.option("--share", "shares", multiple=True, default=(0.0, 0.5, 0.8, 1.0), show_default=True)
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1))
def main(model: str, task_count: int, sizes: tuple[int, ...], shares: tuple[float, ...], rounds: int) -> None:
    """Print first passes with and without stops, and both passes."""
    artifact = artifact_of(model, task_count, layer=LAST)
    with tempfile.TemporaryDirectory() as scratch:
        bundles = {}
        for name, stops in (("all to block 9", ()), ("early stops", STOPS)):
            bundles[name] = Path(scratch) / name
            export_bundle(
                calibrated(artifact, stops),
                Path(__file__),
                bundles[name],
                verify=False,
                progress=Progress(quiet=True),
            )
        plain = OnnxSession(write_plain_pass(bundles["early stops"], Path(scratch)), "cpu")
        with (
            Classifier(bundles["all to block 9"], "cpu", verify="size") as fixed,
            Classifier(bundles["early stops"], "cpu", verify="size") as early,
        ):
            for batch in sizes:
                images = random_images(fixed.manifest, batch, seed=0)
                for share in shares:
                    set_margin(early, share)
                    calls: dict[str, Call] = {"plain": partial(plain.run, {"pixel_values": images})}
                    for name, classifier in (("fixed", fixed), ("early", early)):
                        assert classifier._one_task is not None  # noqa: SLF001
                        calls[f"{name} first"] = partial(classifier._one_task.first_pass, images)  # noqa: SLF001
                        calls[f"{name} both"] = partial(classifier.forward, images)
                    times = interleave(calls, rounds, 1)
                    ratios = {name: float(np.median(ms / times["plain"])) for name, ms in times.items()}
                    click.echo(
                        f"batch {batch:3}, {share:4.0%} stop before block {STOPS[0]}: first pass "
                        f"{ratios['fixed first']:.2f} -> {ratios['early first']:.2f}, both passes "
                        f"{ratios['fixed both']:.2f} -> {ratios['early both']:.2f} of a plain pass"
                    )


if __name__ == "__main__":
    main()
