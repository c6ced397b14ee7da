"""The one-task graph beside the eager model and the graph that gathers, and the plans that choose between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mass_export.artifact import read_artifact
from mass_export.bundle_int8 import convert_bundle_int8
from mass_export.model import MassModel
from runtime.classifier import Classifier
from runtime.errors import BackendError
from runtime.manifest import read_manifest
from runtime.second_pass import Run, plan_second_pass, plan_single_tasks, run_second_pass

MIXED = [(0,), (2,), (0, 1), (1,), (0,), (1, 2), (0, 1, 2), (2,)]


def images(count=8):
    return np.random.default_rng(3).normal(size=(count, 3, 16, 16)).astype(np.float32)


def test_sets_of_one_task_run_together_and_larger_sets_by_size():
    assert plan_second_pass(MIXED, by_task=True) == [
        Run((0, 1, 3, 4, 7), ((0,), (2,), (1,), (0,), (2,))),
        Run((2, 5), ((0, 1), (1, 2))),
        Run((6,), ((0, 1, 2),)),
    ]


def test_many_images_of_a_task_run_alone_and_equally_many_share_a_run():
    tasks = [0] * 9 + [1, 2, 3, 4] * 2 + [5, 6, 6, 6]
    runs = plan_single_tasks(dict(enumerate(tasks)))
    assert [run.sets for run in runs] == [((0,),), ((1,), (2,), (3,), (4,)), ((5,), (6,), (6,), (6,))]
    assert [len(run.samples) for run in runs] == [9, 8, 4]
    assert runs[1].samples == (9, 13, 10, 14, 11, 15, 12, 16)


def test_tasks_of_a_small_batch_share_its_only_run():
    assert plan_single_tasks({3: 1, 5: 0, 8: 1, 9: 0}) == [Run((5, 9, 3, 8), ((0,), (1,)))]
    assert plan_single_tasks({3: 1, 5: 1}) == [Run((3, 5), ((1,),))]


def test_every_sample_is_in_one_run_of_its_own_set():
    rng = np.random.default_rng(0)
    for size in (1, 3):
        for count in (1, 7, 40):
            sets = [
                tuple(sorted(rng.choice(5, rng.integers(1, size + 1), replace=False).tolist()))
                for _ in range(count)
            ]
            for by_task in (False, True):
                runs = plan_second_pass(sets, by_task=by_task)
                assert sorted(row for run in runs for row in run.samples) == list(range(count))
                for run in runs:
                    each = len(run.samples) // len(run.sets)
                    given = [tasks for tasks in run.sets for _ in range(each)]
                    assert [sets[row] for row in run.samples] == given


@pytest.mark.parametrize("patch_embed", ["full", "low_rank"])
@pytest.mark.parametrize("vectors", ["mean", "base"])
@pytest.mark.parametrize("compose", ["tsvm", "sum"])
def test_a_known_task_equals_the_eager_model(pico_bundle, tmp_path, vectors, compose, patch_embed):
    _, _, bundle = pico_bundle(vectors=vectors, compose=compose, router={"layer": 1}, patch_embed=patch_embed)
    model = MassModel(read_artifact(tmp_path / "merged.safetensors"))
    with Classifier(bundle, "cpu", num_threads=1) as classifier:
        assert classifier.manifest.one_task is not None
        for task in classifier.tasks:
            expected = model.forward(torch.from_numpy(images()), tasks=[task])
            actual = classifier.forward(images(), tasks=[task])
            np.testing.assert_allclose(actual.logits, expected.logits, rtol=0, atol=1e-4)
            np.testing.assert_array_equal(actual.class_index, expected.class_index)


@pytest.mark.parametrize("keys", [{}, {"rank": 2}, {"vectors": "base"}, {"patch_embed": "low_rank"}])
def test_a_batch_of_sets_of_every_size_equals_the_graph_that_gathers(pico_bundle, keys):
    _, _, bundle = pico_bundle(router={"layer": 1}, **keys)
    gates = np.full((len(MIXED), 3), 1 / 3, np.float32)
    with Classifier(bundle, "cpu", num_threads=1) as classifier:
        shared = {"pixel_values": images(), "sets": MIXED, "gates": gates}
        parts = classifier._second, classifier.manifest, classifier._cores
        gathered = run_second_pass(*parts, **shared)
        by_task = run_second_pass(*parts, **shared, one_task=classifier._one_task)
    np.testing.assert_allclose(by_task, gathered, rtol=0, atol=2e-5)


def test_the_graph_that_gathers_is_loaded_only_for_sets_of_several_tasks(pico_bundle):
    _, _, bundle = pico_bundle(router={"layer": 1, "mode": "top1"})
    with Classifier(bundle, "cpu", num_threads=1) as classifier:
        classifier.forward(images())
        assert classifier._second._session is None
        classifier._second_pass(images(1), [(0, 1)], np.full((1, 3), 0.5, np.float32))
        assert classifier._second._session is not None


def test_a_closed_classifier_runs_no_task(pico_bundle):
    _, _, bundle = pico_bundle(router={"layer": 1})
    classifier = Classifier(bundle, "cpu", num_threads=1)
    classifier.close()
    with pytest.raises(BackendError, match="closed"):
        classifier._one_task.run(images(1), [0])
    with pytest.raises(BackendError, match="closed"):
        classifier._second.run({})


def test_a_bundle_without_the_one_task_graph_still_answers(pico_bundle, tmp_path):
    from mass_export.bundle_precision import convert_bundle

    _, _, bundle = pico_bundle(router={"layer": 1, "mode": "top1"})
    half = tmp_path / "half"
    half.mkdir()
    convert_bundle(bundle, read_manifest(bundle), half, "fp16")
    with Classifier(bundle, "cpu", num_threads=1) as full, Classifier(half, "cpu", num_threads=1) as other:
        assert other.manifest.one_task is None
        name = full.tasks[1]
        expected, actual = (c.forward(images(), tasks=[name]) for c in (full, other))
    np.testing.assert_allclose(
        actual.logits, expected.logits, rtol=0, atol=0.02 * np.abs(expected.logits).max()
    )


def test_a_first_pass_of_its_own_gives_the_same_answers(pico_bundle):
    _, _, bundle = pico_bundle(router={"layer": 1}, base_merge="zeroshot")
    with (
        Classifier(bundle, "cpu", num_threads=1) as shared,
        Classifier(bundle, "cpu", num_threads=1, share_base=False) as separate,
    ):
        assert shared._one_task.routes
        assert not separate._one_task.routes
        expected, actual = shared.forward(images()), separate.forward(images())
    np.testing.assert_allclose(actual.residuals, expected.residuals, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(actual.selected, expected.selected)


@pytest.mark.parametrize("keys", [{}, {"compose": "sum", "sum_weights": "gates"}, {"base_merge": "zeroshot"}])
def test_bases_of_the_patch_convolution_answer_as_the_eager_model(pico_bundle, tmp_path, keys):
    _, _, bundle = pico_bundle(router={"layer": 1, "threshold": 0.1}, patch_embed="low_rank", rank=2, **keys)
    model = MassModel(read_artifact(tmp_path / "merged.safetensors"))
    with Classifier(bundle, "cpu", num_threads=1) as classifier:
        tables = classifier.manifest.one_task.tables
        assert tables.conv1 is None
        assert tables.conv1_bases.ranks == (4, 4, 4)  # twice the other matrices'
        expected, actual = model.forward(torch.from_numpy(images())), classifier.forward(images())
    np.testing.assert_array_equal(actual.selected, expected.selected)
    np.testing.assert_allclose(actual.residuals, expected.residuals, rtol=0, atol=1e-5)
    np.testing.assert_allclose(actual.logits, expected.logits, rtol=0, atol=1e-4)


def test_a_convolution_that_is_not_of_low_rank_is_kept_whole(pico_bundle):
    _, _, bundle = pico_bundle(router={"layer": 1}, patch_embed="full")
    assert read_manifest(bundle).one_task.tables.conv1_bases is None


def test_bases_of_the_patch_convolution_go_to_eight_bits_too(pico_bundle):
    _, _, full = pico_bundle(router={"layer": 1}, patch_embed="low_rank", rank=2)
    half = full.parent / "int8"
    half.mkdir()
    tables = convert_bundle_int8(full, read_manifest(full), half).one_task.tables
    assert {tables.conv1_bases.u_t.dtype, tables.conv1_bases.vh.dtype} == {"int8"}
    with (
        Classifier(full, "cpu", num_threads=1) as expected,
        Classifier(half, "cpu", num_threads=1) as rounded,
    ):
        for task in expected.tasks:
            wanted, found = (c.forward(images(), tasks=[task]).logits for c in (expected, rounded))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1 * np.abs(wanted).max())
        gates = np.full((8, 3), 1 / 3, np.float32)
        sets = [(0, 1), (1, 2)] * 4
        wanted, found = (c._second_pass(images(), sets, gates) for c in (expected, rounded))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1 * np.abs(wanted).max())
