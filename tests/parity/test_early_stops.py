"""First passes that stop where they are sure: what is chosen, and eager model and graphs agree about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mass_export.artifact import Artifact, read_artifact, write_artifact
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.early_stops import HARM, LEAST_IMAGES, choose_stops
from mass_export.errors import RecipeError
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.router_spec import Tap
from runtime.classifier import Classifier
from runtime.errors import BackendError
from runtime.verification import two_best

QUIET = Progress(quiet=True)
TAPS = [Tap(layer, "mlp") for layer in range(4)]


def posteriors(n: int, easy: float, rng: np.random.Generator) -> tuple[dict[Tap, np.ndarray], np.ndarray]:
    """Easy images are told from block 1 on, the others at block 3 alone; nothing is at block 0."""
    labels = np.arange(n) % 3
    truth = np.eye(3)[labels]
    is_easy = rng.random(n) < easy
    scores = {TAPS[0]: rng.normal(size=(n, 3))}
    scores |= {tap: 20 * truth * is_easy[:, None] + rng.normal(size=(n, 3)) for tap in TAPS[1:3]}
    scores[TAPS[3]] = 20 * truth + rng.normal(size=(n, 3))
    return scores, labels


def test_easy_images_stop_at_the_block_that_tells_them() -> None:
    scores, labels = posteriors(300, 0.8, np.random.default_rng(0))
    chosen = choose_stops(scores, labels, TAPS[3])
    assert chosen.stops == (1,)
    assert chosen.last == TAPS[3]
    assert chosen.blocks < 2
    right = chosen.scores.argmax(axis=1) == labels
    assert np.mean(~right) <= HARM


def test_where_no_block_is_sure_all_images_go_to_the_fixed_one() -> None:
    scores, labels = posteriors(300, 0.0, np.random.default_rng(0))
    chosen = choose_stops(scores, labels, TAPS[3])
    assert chosen.stops == ()
    assert chosen.last == TAPS[3]
    np.testing.assert_array_equal(chosen.scores, scores[TAPS[3]])


def test_few_images_say_too_little() -> None:
    scores, labels = posteriors(3 * (LEAST_IMAGES - 1), 1.0, np.random.default_rng(0))
    assert choose_stops(scores, labels, TAPS[3]).stops == ()


def images_of(task: int, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([task, seed])
    return (rng.normal(size=(count, 3, 16, 16)) + 0.4 * (task - 1)).astype(np.float32)


@pytest.fixture
def artifact(pico_files: Callable[..., Path]) -> Artifact:
    """Calibrated, and half of the images stop early."""
    router = {"layers": [0, 1, 2], "standardize": "tasks", "mode": "top1"}
    merged = merge(load_recipe(pico_files(tasks=3, base_merge="zeroshot", router=router)), QUIET)
    images = {f"task{i}": images_of(i, 40) for i in range(3)}
    calibrated, _ = calibrate_task_images(merged, images, verify=False, progress=QUIET)
    info = calibrated.info.calibration
    assert info is not None
    assert info.stops
    every = with_margin(calibrated, 0.0)
    leads = two_best(MassModel(every).residuals(torch.from_numpy(probes())).numpy())[1]
    return with_margin(calibrated, float(np.median(leads)))


def with_margin(artifact: Artifact, margin: float) -> Artifact:
    assert artifact.info.calibration is not None
    info = dataclasses.replace(artifact.info.calibration, stop_margin=margin)
    return dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, calibration=info))


def probes() -> np.ndarray:
    return np.concatenate([images_of(task, 20, seed=1) for task in range(3)])


def test_graphs_answer_as_the_eager_model_does(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "merged.safetensors"
    write_artifact(path, artifact)
    bundle = export_bundle(read_artifact(path), path, tmp_path / "bundle", verify=True, progress=QUIET)
    eager = MassModel(artifact, torch.float64).forward(torch.from_numpy(probes()))
    for share_base in (True, False):  # divided at the stops, and in one graph
        with Classifier(bundle, "cpu", share_base=share_base) as classifier:
            exported = classifier.forward(probes())
            alone = [classifier.forward(image[None]).residuals[0] for image in probes()[:6]]
        np.testing.assert_allclose(exported.residuals, eager.residuals, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(exported.unknown, eager.unknown, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(exported.selected, eager.selected)
        np.testing.assert_allclose(exported.logits, eager.logits, rtol=0, atol=2e-4)
        np.testing.assert_allclose(np.stack(alone), exported.residuals[:6], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("margin", "goes_on"), [(0.0, False), (1e9, True)])
def test_images_that_are_sure_run_no_further_block(
    artifact: Artifact, tmp_path: Path, *, margin: float, goes_on: bool
) -> None:
    path = tmp_path / "merged.safetensors"
    write_artifact(path, with_margin(artifact, margin))
    bundle = export_bundle(read_artifact(path), path, tmp_path / "bundle", verify=False, progress=QUIET)
    with Classifier(bundle, "cpu") as classifier:
        parts = classifier._one_task
        assert parts is not None
        for part in parts._segments[1:]:
            part.session.close()
        if goes_on:
            with pytest.raises(BackendError, match="closed"):
                parts.first_pass(probes())
        else:
            assert parts.first_pass(probes())["residuals"].shape == (60, 3)


def test_stops_that_no_discriminant_reads_are_refused(artifact: Artifact) -> None:
    assert artifact.info.calibration is not None
    with pytest.raises(RecipeError, match=r"calibration\.stops"):
        dataclasses.replace(artifact.info.calibration, stops=(7,))
