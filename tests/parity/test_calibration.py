"""Calibrated routers: closed forms that do what they say, in eager and in the graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mass_export.artifact import Artifact, read_artifact, write_artifact
from mass_export.calibration_features import tap_features
from mass_export.calibration_pool import calibrate_pool
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.discriminant import cross_validate, fit_discriminant
from mass_export.errors import DataError
from mass_export.head_evidence import agreement
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.router_spec import Tap
from mass_export.routing import whitened_distance
from mass_export.synthetic_images import dull_images, synthetic_images
from mass_export.vit import encode
from runtime.classifier import Classifier

QUIET = Progress(quiet=True)


@pytest.fixture
def artifact(pico_files: Callable[..., Path]) -> Artifact:
    router = {"layers": [0, 1, 2], "standardize": "tasks", "mode": "top1"}
    return merge(load_recipe(pico_files(tasks=3, base_merge="zeroshot", router=router)), QUIET)


def images_of(task: int, count: int) -> np.ndarray:
    """Images whose mean tells the task."""
    rng = np.random.default_rng(task)
    return (rng.normal(size=(count, 3, 16, 16)) + 3 * (task - 1)).astype(np.float32)


def task_images(count: int = 12) -> dict[str, np.ndarray]:
    return {f"task{i}": images_of(i, count) for i in range(3)}


def assert_exported_equals_eager(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "merged.safetensors"
    write_artifact(path, artifact)
    bundle = export_bundle(read_artifact(path), path, tmp_path / "bundle", verify=False, progress=QUIET)
    images = np.concatenate([images_of(i, 8) for i in range(3)])
    eager = MassModel(artifact, torch.float64).forward(torch.from_numpy(images))
    with Classifier(bundle, provider="cpu") as classifier:
        exported = classifier.forward(images)
    np.testing.assert_allclose(exported.residuals, eager.residuals, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(exported.unknown, eager.unknown, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(exported.selected, eager.selected)
    np.testing.assert_allclose(exported.logits, eager.logits, rtol=0, atol=2e-4)


def test_a_pool_centres_and_scales_each_tasks_residuals(artifact: Artifact, tmp_path: Path) -> None:
    pool = np.random.default_rng(0).normal(size=(40, 3, 16, 16)).astype(np.float32)
    calibrated = calibrate_pool(artifact, pool, pseudo_labels=False, progress=QUIET)
    score = MassModel(calibrated, torch.float64).residuals(torch.from_numpy(pool))
    assert calibrated.calibration is not None
    assert calibrated.calibration.offset.shape == (3, 3)
    assert score.mean(dim=0).abs().max() < 0.35  # standardised per task: no task is favoured on the pool
    assert_exported_equals_eager(calibrated, tmp_path)


def test_synthetic_images_are_deterministic_and_in_range(artifact: Artifact) -> None:
    images = synthetic_images(artifact, 16)
    spec = artifact.info.preprocess
    pixels = images * np.array(spec.std)[:, None, None] + np.array(spec.mean)[:, None, None]
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    np.testing.assert_array_equal(images, synthetic_images(artifact, 16))


def test_a_discriminant_routes_by_a_few_images_a_task(artifact: Artifact, tmp_path: Path) -> None:
    calibrated, trials = calibrate_task_images(artifact, task_images(), progress=QUIET)
    fresh = np.concatenate([images_of(i, 60)[12:] for i in range(3)])
    routed = MassModel(calibrated).forward(torch.from_numpy(fresh)).task_index
    assert np.mean(routed == np.repeat(np.arange(3), 48)) > 0.95
    assert len(trials) == 3
    assert calibrated.info.read_taps() == calibrated.info.calibration.discriminant
    assert_exported_equals_eager(calibrated, tmp_path)


def test_the_first_pass_ends_at_the_discriminants_tap(artifact: Artifact, tmp_path: Path) -> None:
    calibrated, _ = calibrate_task_images(artifact, task_images(), tap=Tap(0, "mlp"), progress=QUIET)
    assert_exported_equals_eager(calibrated, tmp_path)
    graph = (tmp_path / "bundle" / "first_pass.onnx").read_bytes()
    assert b"resblocks.0.attn" in graph
    assert b"resblocks.0.mlp.c_proj" not in graph
    assert b"resblocks.1" not in graph


def test_tasks_without_images_are_still_reached_through_their_residuals(
    artifact: Artifact, tmp_path: Path
) -> None:
    images = task_images()
    del images["task1"]
    calibrated, _ = calibrate_task_images(artifact, images, progress=QUIET)
    assert calibrated.info.calibration.residual_weight > 0
    assert_exported_equals_eager(calibrated, tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"task0": 4, "other": 4}, "unknown tasks other"),
        ({"task0": 4}, "2 tasks"),
        ({"task0": 4, "task1": 1}, "task1"),
    ],
)
def test_too_few_or_unknown_images_are_refused(
    images: dict[str, int], message: str, artifact: Artifact
) -> None:
    arrays = {name: np.zeros((count, 3, 16, 16), np.float32) for name, count in images.items()}
    with pytest.raises(DataError, match=message):
        calibrate_task_images(artifact, arrays, progress=QUIET)


def test_the_discriminant_separates_gaussians_as_bayes_would() -> None:
    rng = np.random.default_rng(0)
    means = np.array([[0.0, 0, 0], [3, 0, 0], [0, 3, 0]])
    labels = np.repeat(np.arange(3), 400)
    features = means[labels] + rng.normal(size=(1200, 3)) * [1, 1, 5]
    weight, bias = fit_discriminant(features, labels)
    bayes = ((features[:, None, :2] - means[None, :, :2]) ** 2).sum(axis=2).argmin(axis=1)
    assert np.mean((features @ weight.T + bias).argmax(axis=1) == bayes) > 0.97
    assert cross_validate(features, labels) == pytest.approx(np.mean(bayes == labels), abs=0.03)


def test_more_dimensions_than_images_stay_finite() -> None:
    features = np.random.default_rng(0).normal(size=(10, 64))
    weight, bias = fit_discriminant(features, np.arange(10) % 2)
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()


def test_the_fit_is_the_same_whether_images_or_dimensions_are_fewer() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(30) % 3
    features = rng.normal(size=(30, 20)) + labels[:, None]
    padded = np.concatenate(
        [features, np.zeros((30, 40))], axis=1
    )  # more dimensions than images, no more content
    weight, bias = fit_discriminant(padded, labels)
    means = np.stack([padded[labels == k].mean(axis=0) for k in range(3)])
    residual = padded - means[labels]
    # The fit solves S w = m for one S = a C + b I: recover a and b from two directions and check all others.
    moments = residual.T @ residual / 27
    columns = np.stack([(moments @ weight.T).ravel(), weight.T.ravel()], axis=1)
    solution, *_ = np.linalg.lstsq(columns, means.T.ravel(), rcond=None)
    np.testing.assert_allclose(columns @ solution, means.T.ravel(), atol=1e-9)
    assert 0 < solution[0] < 1
    np.testing.assert_allclose(bias, -0.5 * (weight * means).sum(axis=1))


def test_a_pool_teaches_the_router_its_own_answers(artifact: Artifact, tmp_path: Path) -> None:
    pool = np.concatenate([images_of(i, 20) for i in range(3)])
    plain = calibrate_pool(artifact, pool, pseudo_labels=False, progress=QUIET)
    taught = calibrate_pool(artifact, pool, progress=QUIET)
    assert plain.info.calibration.discriminant == ()
    assert taught.info.calibration.discriminant == (Tap(2, "mlp"),)
    images = torch.from_numpy(pool)
    before, after = (MassModel(a, torch.float64).residuals(images) for a in (plain, taught))
    assert (before.argmin(dim=1) == after.argmin(dim=1)).double().mean() > 0.8
    assert not torch.allclose(before, after)
    assert_exported_equals_eager(taught, tmp_path)


def test_unsure_routes_of_a_calibrated_router_are_verified(artifact: Artifact, tmp_path: Path) -> None:
    top1 = dataclasses.replace(
        artifact,
        info=dataclasses.replace(
            artifact.info, router=dataclasses.replace(artifact.info.router, mode="top1")
        ),
    )
    calibrated, _ = calibrate_task_images(top1, task_images(), progress=QUIET)
    router = calibrated.info.router
    assert router.verify_margin > 0
    assert router.verify_prior == 0.1
    unverified, _ = calibrate_task_images(top1, task_images(), verify=False, progress=QUIET)
    assert unverified.info.router.verify_margin == 0
    assert_exported_equals_eager(calibrated, tmp_path)


def test_where_heads_speak_synthetic_images_change_nothing(artifact: Artifact) -> None:
    router = dataclasses.replace(artifact.info.router, evidence=1.0)
    speaking = dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))
    images = synthetic_images(artifact, 8)
    calibrated = calibrate_pool(speaking, images, synthetic=True, progress=QUIET)
    before, after = (
        MassModel(a, torch.float64).residuals(torch.from_numpy(images)) for a in (speaking, calibrated)
    )
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("agree", [True, False])
def test_a_pool_hears_heads_that_agree_with_the_residuals(
    pico_files: Callable[..., Path], tmp_path: Path, *, agree: bool
) -> None:
    router = {"layers": [1, 2], "standardize": "length", "mode": "top1", "evidence": 0}
    artifact = merge(load_recipe(pico_files(tasks=3, base_merge="zeroshot", router=router)), QUIET)
    images = synthetic_images(artifact, 240)
    model, batch = MassModel(artifact), torch.from_numpy(images)
    same = (model.residuals(batch).argmin(dim=1) == model.evidence(batch).argmax(dim=1)).numpy()
    pool = images[same == agree]
    calibrated = calibrate_pool(artifact, pool, progress=QUIET)
    assert calibrated.info.router.evidence == (0.5 if agree else 0.0)
    assert calibrate_pool(artifact, pool, hear_heads=False, progress=QUIET).info.router.evidence == 0
    assert calibrated.without_calibration().info == artifact.info
    assert_exported_equals_eager(calibrated, tmp_path)


def test_a_pool_removes_bias_as_far_as_it_exceeds_what_images_differ_by(
    pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    router = {"layers": [0, 2], "standardize": "length", "mode": "top1", "evidence": 0}
    artifact = merge(load_recipe(pico_files(tasks=3, base_merge="zeroshot", router=router)), QUIET)
    pool = np.random.default_rng(0).normal(size=(40, 3, 16, 16)).astype(np.float32)
    calibrated = calibrate_pool(artifact, pool, hear_heads=False, pseudo_labels=False, progress=QUIET)
    assert calibrated.calibration is not None
    features = tap_features(artifact, pool, artifact.info.taps(), QUIET)
    for tap, offset in zip(artifact.info.taps(), calibrated.calibration.offset.numpy(), strict=True):
        z = features[tap].numpy()
        length = np.linalg.norm(z, axis=1)
        bases = [of_task[tap.parameter].double().numpy() for of_task in artifact.routing_bases]
        share = np.stack([np.linalg.norm(z - z @ vh.T @ vh, axis=1) / length for vh in bases], axis=1)
        means = share.mean(axis=0)
        between, within = means.var(), np.mean(np.var(share - means, axis=1))
        expected = between / (between + within) * (means - means.mean())
        np.testing.assert_allclose(offset, expected, rtol=1e-4, atol=1e-6)
        assert between / (between + within) > 0.05
    np.testing.assert_array_equal(calibrated.calibration.scale, 1)
    assert_exported_equals_eager(calibrated, tmp_path)


def test_what_is_nearer_to_nothing_is_less_known() -> None:
    rng = np.random.default_rng(0)
    z, whiten, centres, nothing = (
        torch.from_numpy(rng.normal(size=size)) for size in ((50, 6), (6, 6), (3, 6), (4, 6))
    )
    white = (z @ whiten).numpy()
    known, other = (
        np.sqrt(((white[:, None] - points.numpy()) ** 2).mean(axis=2)).min(axis=1)
        for points in (centres, nothing)
    )
    found = whitened_distance(z, whiten, centres, nothing).numpy()
    np.testing.assert_allclose(found, np.where(other < known, known**2 / other, known))
    assert 0 < np.mean(other < known) < 1
    np.testing.assert_allclose(whitened_distance(z, whiten, centres).numpy(), known)
    on_it = torch.linalg.solve(whiten.T, nothing[0])[None]  # the feature of a dull image itself: finite
    assert torch.isfinite(whitened_distance(on_it, whiten, centres, nothing)).all()


@pytest.mark.parametrize("level", ["pool", "task_images"])
def test_dull_images_are_less_known_than_without_such_to_compare_with(artifact: Artifact, level: str) -> None:
    images = task_images(30)
    calibrated = (
        calibrate_pool(artifact, np.concatenate(list(images.values())), progress=QUIET)
        if level == "pool"
        else calibrate_task_images(artifact, images, progress=QUIET)[0]
    )
    assert calibrated.calibration is not None
    old = dataclasses.replace(
        calibrated, calibration=dataclasses.replace(calibrated.calibration, nothing=None, stop_nothing=None)
    )
    dull = torch.from_numpy(dull_images(images["task1"], artifact.info.preprocess, seed=1))
    with_dull, without = (MassModel(a).first_pass(dull)[1] for a in (calibrated, old))
    assert with_dull is not None
    assert without is not None
    assert (with_dull >= without - 1e-6).all()
    assert (with_dull > without + 1e-3).float().mean() > 0.3


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_agreement_is_cohens_kappa(pairs: list[tuple[int, int]]) -> None:
    ours, others = (np.array(column) for column in zip(*pairs, strict=True))
    assert agreement(ours, others) == pytest.approx(agreement(others, ours))
    assert agreement(ours, others) <= 1 + 1e-9
    table = np.zeros((4, 4))
    np.add.at(table, (ours, others), 1 / len(ours))
    by_chance = table.sum(axis=1) @ table.sum(axis=0)
    if by_chance < 1 - 1e-9:
        assert agreement(ours, others) == pytest.approx((np.trace(table) - by_chance) / (1 - by_chance))


def test_calibrating_again_starts_from_the_settings_of_the_merge(
    pico_files: Callable[..., Path], tmp_path: Path
) -> None:
    router = {"layers": [0, 1, 2], "standardize": "tasks", "mode": "top1", "evidence": 2.0}
    artifact = merge(load_recipe(pico_files(tasks=3, base_merge="zeroshot", router=router)), QUIET)
    by_task, _ = calibrate_task_images(artifact, task_images(), progress=QUIET)
    assert by_task.info.router.evidence == 0
    assert by_task.info.router.verify_margin > 0
    write_artifact(tmp_path / "by_task.safetensors", by_task)
    read = read_artifact(tmp_path / "by_task.safetensors")
    assert read.without_calibration().info == artifact.info

    pool = np.random.default_rng(0).normal(size=(40, 3, 16, 16)).astype(np.float32)
    again, direct = (calibrate_pool(start, pool, progress=QUIET) for start in (read, artifact))
    assert again.info == direct.info
    images = torch.from_numpy(pool)
    assert torch.equal(MassModel(again).residuals(images), MassModel(direct).residuals(images))


def unknown_by_hand(artifact: Artifact, images: np.ndarray) -> np.ndarray:
    """The score without images, from features and bases, in plain numpy."""
    tap = artifact.info.taps()[-1]
    z = tap_features(artifact, images, [tap], QUIET)[tap].numpy()
    shares = []
    for bases in artifact.router_bases:
        vh = bases[tap.parameter].double().numpy()
        shares.append(np.linalg.norm(z - z @ vh.T @ vh, axis=1) / np.linalg.norm(z, axis=1))
    return np.min(shares, axis=0)


def test_without_images_unknown_is_the_smallest_share_outside_a_subspace(artifact: Artifact) -> None:
    images = task_images()["task0"]
    _, unknown = MassModel(artifact, torch.float64).first_pass(torch.from_numpy(images))
    np.testing.assert_allclose(unknown.numpy(), unknown_by_hand(artifact, images), rtol=1e-5)
    assert (unknown > 0).all()


@pytest.mark.parametrize("norm", ["l1", "mahalanobis"])
def test_the_share_does_not_depend_on_the_scale_of_the_norm(
    pico_files: Callable[..., Path], tmp_path: Path, norm: str
) -> None:
    router = {"layers": [1], "norm": norm, "mode": "top1"}
    artifact = merge(load_recipe(pico_files(tasks=3, base_merge="zeroshot", router=router)), QUIET)
    images = task_images()["task1"]
    _, unknown = MassModel(artifact, torch.float64).first_pass(torch.from_numpy(images))
    assert ((unknown > 0) & (unknown < 2)).all()
    if norm == "mahalanobis":
        np.testing.assert_allclose(unknown.numpy(), unknown_by_hand(artifact, images), rtol=1e-6)
    assert_exported_equals_eager(artifact, tmp_path)


def test_strong_evidence_makes_an_image_known(artifact: Artifact, tmp_path: Path) -> None:
    router = dataclasses.replace(artifact.info.router, evidence=2.0)
    speaking = dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))
    images = task_images()["task0"]
    _, unknown = MassModel(speaking, torch.float64).first_pass(torch.from_numpy(images))
    heads = [head.weight.double() for head in speaking.heads]
    feature = encode(
        {n: p.double() for n, p in speaking.base.items()},
        torch.from_numpy(images).double(),
        speaking.info.vision,
    )
    claims = []
    for weight in heads:
        cosines = feature @ weight.T * 28 / weight.norm(dim=1).mean()
        claims.append(cosines.logsumexp(dim=1) - np.log(len(weight)))
    expected = 20 * unknown_by_hand(speaking, images) - torch.stack(claims).amax(dim=0).numpy()
    np.testing.assert_allclose(unknown.numpy(), expected, rtol=1e-5)
    assert_exported_equals_eager(speaking, tmp_path)


@pytest.mark.parametrize("level", ["pool", "task_images"])
def test_calibration_images_are_known_and_others_are_not(
    artifact: Artifact, tmp_path: Path, level: str
) -> None:
    by_task = task_images(40)
    if level == "pool":
        calibrated = calibrate_pool(artifact, np.concatenate(list(by_task.values())), progress=QUIET)
    else:
        calibrated, _ = calibrate_task_images(artifact, by_task, progress=QUIET)
    threshold = calibrated.info.calibration.unknown_threshold
    fresh = np.concatenate([images_of(task, 80)[40:] for task in range(3)])
    rows, columns = np.mgrid[0:16, 0:16]
    stripes = np.broadcast_to(4.0 * np.sign(np.sin(rows + columns)), (30, 3, 16, 16)).astype(np.float32)
    model = MassModel(calibrated, torch.float64)
    known, strange = (model.first_pass(torch.from_numpy(x))[1].numpy() for x in (fresh, stripes))
    assert np.mean(known > threshold) < 0.25
    assert (strange > threshold).all()
    assert 0.3 < np.median(known) < 3
    assert_exported_equals_eager(calibrated, tmp_path)


def test_the_verdict_reaches_the_prediction(artifact: Artifact, tmp_path: Path) -> None:
    calibrated, _ = calibrate_task_images(artifact, task_images(40), progress=QUIET)
    path = tmp_path / "merged.safetensors"
    write_artifact(path, calibrated)
    assert read_artifact(path).info == calibrated.info
    export_bundle(read_artifact(path), path, tmp_path / "bundle", verify=True, progress=QUIET)
    stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))
    with Classifier(tmp_path / "bundle") as classifier:
        (prediction,) = classifier.predict([stripes])
        assert prediction.is_unknown is (prediction.unknown > classifier.router.unknown_threshold)
        (given,) = classifier.predict([stripes], tasks=["task0"])
        assert (given.unknown, given.is_unknown) == (None, None)
    for step, verdict in ((0.1, False), (-0.1, True)):
        with Classifier(tmp_path / "bundle", unknown_threshold=prediction.unknown + step) as classifier:
            assert classifier.predict([stripes])[0].is_unknown is verdict


def test_where_some_tasks_have_no_images_their_likeness_is_not_judged(artifact: Artifact) -> None:
    some = {name: images for name, images in task_images().items() if name != "task2"}
    calibrated, _ = calibrate_task_images(artifact, some, progress=QUIET)
    assert calibrated.info.calibration.unknown is None
    assert calibrated.info.calibration.unknown_threshold is None
    images = torch.from_numpy(task_images()["task2"])
    before, after = (MassModel(a).first_pass(images)[1] for a in (artifact, calibrated))
    torch.testing.assert_close(before, after)


def test_a_pool_of_which_each_task_gets_one_image_gives_no_verdict(artifact: Artifact) -> None:
    images = np.concatenate([images_of(task, 12) for task in range(3)])
    scaled = calibrate_pool(artifact, images[[0, -1]], pseudo_labels=False, progress=QUIET)
    answers = MassModel(scaled).residuals(torch.from_numpy(images[[0, -1]])).argmin(dim=1)
    assert len(set(answers.tolist())) == 2  # else this tests nothing
    calibrated = calibrate_pool(artifact, images[[0, -1]], progress=QUIET)
    assert calibrated.info.calibration.unknown is None
    assert calibrated.info.calibration.discriminant == ()
    assert MassModel(calibrated).first_pass(torch.from_numpy(images))[1] is not None
