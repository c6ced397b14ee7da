"""Bases lie task by task in the weights file, whatever their ranks, widths and number of tables."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import mass_export.stacked_bases
from mass_export.artifact import read_artifact
from mass_export.bundle_int8 import convert_bundle_int8
from mass_export.bundle_precision import convert_bundle
from mass_export.low_rank import LowRank
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.stacked_bases import Place, place_in, store_bases
from mass_export.weights_file import WeightsFile
from runtime.bundle import all_matrices
from runtime.classifier import Classifier
from runtime.manifest import read_manifest
from runtime.mapped_files import map_array

WIDTH = 32


@pytest.fixture
def small_tables(monkeypatch):
    monkeypatch.setattr(mass_export.stacked_bases, "MAX_ELEMENTS", 3 * 40 * WIDTH)


def random_factors(rank, out, into, seed):
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(out, rank)), rng.random(rank), rng.normal(size=(rank, into))
    return LowRank(*(torch.from_numpy(part.astype(np.float32)) for part in parts))


def test_sides_of_any_rank_and_width_are_read_as_they_were(tmp_path):
    sizes = {"wide": (96, 32), "odd": (40, 32), "square": (32, 32), "none": (32, 64)}
    ranks = {"wide": (2, 5, 3), "odd": (1, 4, 4), "square": (0, 1, 0), "none": (0, 0, 0)}
    factors = {
        name: [random_factors(rank, *sizes[name], seed) for seed, rank in enumerate(ranks[name])]
        for name in sizes
    }
    with WeightsFile(tmp_path / "w") as weights:
        bases = store_bases(weights, factors, dict.fromkeys(sizes, ""), WIDTH, Progress(quiet=True))
    (table,) = bases.tables
    assert table.shape == (3 * (5 * 3 + 5 + 4 + 1 + 1), WIDTH)
    for name, of_tasks in factors.items():
        stored = bases.matrices[name]
        assert stored.ranks == ranks[name]
        for task, wanted in enumerate(of_tasks):
            u_t, s, vh = (map_array(tmp_path, a)[task] for a in (stored.u_t, stored.s, stored.vh))
            for found, rows in ((u_t, wanted.u.numpy().T), (s, wanted.s.numpy()), (vh, wanted.vh.numpy())):
                np.testing.assert_array_equal(found[: wanted.rank], rows)
                assert not found[wanted.rank :].any()
    apart = {
        (name, side)
        for name, m in bases.matrices.items()
        for side in ("u_t", "vh")
        if bases.place(getattr(m, side)) is None
    }
    assert apart == {("odd", "u_t"), ("none", "u_t"), ("none", "vh")}


def test_a_large_table_behind_a_small_one_is_told_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(mass_export.stacked_bases, "MAX_ELEMENTS", 10 * WIDTH)
    factors = {"small": [random_factors(1, 32, 32, 0)], "large": [random_factors(9, 32, 40, 1)]}
    with WeightsFile(tmp_path / "w") as weights:
        bases = store_bases(weights, factors, dict.fromkeys(factors, ""), WIDTH, Progress(quiet=True))
    assert [table.shape[0] for table in bases.tables] == [2, 9]
    places = {name: bases.place(matrix.u_t) for name, matrix in bases.matrices.items()}
    assert places == {"small": Place(0, 0, 1), "large": Place(1, 0, 9)}


def test_what_belongs_to_a_task_is_one_stretch_of_the_file(pico_bundle):
    _, _, bundle = pico_bundle(router={"layer": 1}, patch_embed="low_rank", rank=2)
    manifest = read_manifest(bundle)
    (table,) = manifest.one_task.bases
    share = table.nbytes // len(manifest.tasks)
    ends = []
    for matrix in all_matrices(manifest):
        for side in (matrix.u_t, matrix.vh):
            if side.stride is not None:
                assert side.stride == share
                ends.append((side.offset - table.offset, side.nbytes // len(manifest.tasks)))
    ends.sort()
    assert ends[0][0] == 0
    assert all(start + size == following for (start, size), (following, _) in pairwise(ends))
    assert sum(size for _, size in ends) == share


@pytest.mark.usefixtures("small_tables")
@pytest.mark.parametrize("keys", [{}, {"compose": "sum"}, {"patch_embed": "low_rank", "rank": 2}])
def test_bases_in_several_tables_answer_as_the_eager_model(pico_bundle, tmp_path, keys):
    _, _, bundle = pico_bundle(router={"layer": 1, "threshold": 0.1}, base_merge="zeroshot", **keys)
    manifest = read_manifest(bundle)
    assert len(manifest.one_task.bases) > 2
    images = np.random.default_rng(3).normal(size=(8, 3, 16, 16)).astype(np.float32)
    model = MassModel(read_artifact(tmp_path / "merged.safetensors"))
    with Classifier(bundle, "cpu", num_threads=1) as classifier:
        for tasks in (None, [classifier.tasks[2]]):
            wanted = model.forward(torch.from_numpy(images), tasks=tasks)
            found = classifier.forward(images, tasks=tasks)
            np.testing.assert_array_equal(found.selected, wanted.selected)
            np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("small_tables")
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_every_table_is_converted_and_its_sides_are_found_again(pico_bundle, tmp_path, precision):
    _, _, bundle = pico_bundle(router={"layer": 1})
    target, manifest = tmp_path / precision, read_manifest(bundle)
    target.mkdir()
    if precision == "int8":
        converted = convert_bundle_int8(bundle, manifest, target)
    else:
        converted = convert_bundle(bundle, manifest, target, "fp16")
    for old, new in zip(manifest.matrices, converted.matrices, strict=True):
        for side, scale in (("u_t", new.u_scale), ("vh", new.vh_scale)):
            before, after = getattr(old, side), getattr(new, side)
            assert (after.stride is None) == (before.stride is None)
            values = map_array(target, after).astype(np.float32)
            if scale is not None:
                values *= map_array(target, scale)[:, :, None]
                assert place_in(converted.one_task.bases, after) == place_in(manifest.one_task.bases, before)
            np.testing.assert_allclose(values, map_array(bundle, before), rtol=0, atol=5e-3)
    assert converted.files["weights.bin"].bytes < 0.6 * manifest.files["weights.bin"].bytes
