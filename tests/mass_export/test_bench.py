"""Benches: what is timed, and how the turns are taken."""

from __future__ import annotations

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mass_export.artifact import read_artifact
from mass_export.bench import BenchSettings, interleave, two_passes
from mass_export.bench_plain import write_plain_pass
from mass_export.bench_reference import eager_things
from mass_export.bench_start import bench_start
from mass_export.cli import main
from mass_export.errors import DataError
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.vit import encode
from runtime.classifier import Classifier
from runtime.onnx_session import OnnxSession

BUNDLE_ROWS = {
    "plain", "plain_trimmed", "two_pass_top1_mixed",
    "two_pass_top1_one_task", "known_task", "two_pass_set2", "two_pass_set3",
}  # fmt: skip
EAGER_ROWS = {"eager", "reference_cached", "reference_uncached"}


def images(count=6):
    return np.random.default_rng(3).normal(size=(count, 3, 16, 16)).astype(np.float32)


def test_calls_take_turns_and_warm_up_rounds_are_not_counted():
    seen = []
    calls = {name: partial(seen.append, name) for name in "ab"}
    times = interleave(calls, rounds=3, warmup=2)
    assert seen == list("ab" * 5)
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_what_takes_too_long_is_called_less_but_at_least_once():
    ticks = itertools.count(0, 10)  # every call takes ten seconds
    times = interleave({"slow": lambda: None}, rounds=9, warmup=0, longest_s=25, clock=lambda: next(ticks))
    assert times["slow"].tolist() == [10e3] * 3


def test_the_plain_pass_runs_and_has_every_head(pico_bundle, tmp_path):
    _, _, bundle = pico_bundle(router={"layer": 1}, base_merge="zeroshot")
    artifact = read_artifact(tmp_path / "merged.safetensors")
    plain = OnnxSession(write_plain_pass(bundle, tmp_path), "cpu", 1)
    logits = plain.run({"pixel_values": images()})["logits"]
    assert logits.shape == (6, sum(len(task.classes) for task in artifact.info.tasks))
    assert np.isfinite(logits).all()
    trimmed = OnnxSession(write_plain_pass(bundle, tmp_path, trimmed=True), "cpu", 1)
    np.testing.assert_allclose(trimmed.run({"pixel_values": images()})["logits"], logits, rtol=0, atol=1e-4)


def test_given_sets_replace_the_routers_choice(pico_bundle):
    _, _, bundle = pico_bundle(router={"layer": 1, "mode": "top1"})
    with Classifier(bundle, "cpu", num_threads=1) as classifier:
        given = two_passes(classifier, images(), [(2,)] * 6).logits
        known = classifier.forward(images(), tasks=[classifier.tasks[2]]).logits
        routed = classifier.forward(images())
        np.testing.assert_array_equal(given, known)
        assert routed.residuals is not None
        again = classifier.forward(images())
    np.testing.assert_array_equal(routed.logits, again.logits)


def test_the_references_way_gives_the_logits_of_each_images_task(pico_bundle, tmp_path):
    pico_bundle(router={"layer": 1})
    artifact = read_artifact(tmp_path / "merged.safetensors")
    things = eager_things(tmp_path / "merged.safetensors", threads=1)
    model = MassModel(artifact)
    kept, rebuilt = (things[name](images())[1] for name in ("reference_cached", "reference_uncached"))
    torch.testing.assert_close(kept, rebuilt)
    for row in range(6):
        expected = model.forward(torch.from_numpy(images()[row : row + 1]), tasks=[model.task_names[row % 3]])
        biases = [h.bias if h.bias is not None else torch.zeros(len(h.weight)) for h in artifact.heads]
        np.testing.assert_allclose((kept[row] + torch.cat(biases)).numpy(), expected.logits[0], atol=1e-4)
    feature = things["reference_cached"](images())[0]
    torch.testing.assert_close(
        feature, encode(artifact.merged, torch.from_numpy(images()), artifact.info.vision)
    )


def test_the_processor_clock_needs_one_thread():
    with pytest.raises(DataError, match="1 thread"):
        BenchSettings(clock="cpu")


def test_bench_prints_one_json_object_with_every_row(pico_bundle, tmp_path):
    _, _, bundle = pico_bundle(router={"layer": 1})
    arguments = [
        "bench",
        "--bundle",
        bundle,
        "--artifact",
        tmp_path / "merged.safetensors",
        "--json",
        "--quiet",
    ]
    arguments += ["--batch", 2, "--rounds", 2, "--threads", 1, "--clock", "cpu"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {"machine", "start", "rows"} <= result.keys()
    assert {row["what"] for row in result["rows"]} == BUNDLE_ROWS | EAGER_ROWS
    for row in result["rows"]:
        assert row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert (row["batch"], row["tasks"], row["precision"]) == (2, 3, "fp32")
    assert result["rows"][0]["ratio_to_plain_fp32"] == 1


def test_bench_shows_a_table(pico_bundle):
    _, _, bundle = pico_bundle(router={"layer": 1})
    done = CliRunner().invoke(main, ["bench", "--bundle", str(bundle), "--batch", "1", "--rounds", "1", "-q"])
    assert done.exit_code == 0, done.output
    assert "known_task" in done.stdout


def test_opening_and_memory_are_measured_in_processes_of_their_own(pico_bundle, tmp_path):
    _, _, bundle = pico_bundle(router={"layer": 1}, base_merge="zeroshot")
    plain = write_plain_pass(bundle, tmp_path)
    start = bench_start(bundle, plain, threads=1, rounds=1, progress=Progress(quiet=True))
    assert min(start[kind]["open_s"] for kind in ("plain", "bundle")) > 0
    stored = (bundle / "weights.bin").stat().st_size / 2**20
    assert 0 < start["bundle"]["weights_mib"] < stored  # one image of three tasks
