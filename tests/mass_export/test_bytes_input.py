"""Graphs that take bytes beside those that take normalised images."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mass_export.artifact import read_artifact
from mass_export.cli import main
from mass_export.image_input import nearest_bytes, normalised
from mass_export.model import MassModel
from mass_export.verify import random_pixel_values
from runtime.classifier import Classifier
from runtime.errors import InputError
from runtime.manifest import read_manifest
from runtime.preprocess import pixel_values_from_images

KEYS = [{}, {"base_merge": "zeroshot"}, {"compose": "sum"}, {"patch_embed": "low_rank", "rank": 2}]


def pictures(count=9):
    return np.random.default_rng(5).integers(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.fixture
def both(pico_bundle, tmp_path):
    def make(*options, **keys):
        _, _, floats = pico_bundle(router={"layer": 1, "threshold": 0.1}, **keys)
        out = tmp_path / "bytes"
        artifact = tmp_path / "merged.safetensors"
        arguments = ["export", "--artifact", artifact, "--out", out, "--input", "uint8", *options]
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return floats, out

    return make


@pytest.mark.parametrize("keys", KEYS)
def test_bytes_give_the_answers_of_normalised_images(both, tmp_path, keys):
    floats, out = both(**keys)
    model = MassModel(read_artifact(tmp_path / "merged.safetensors"))
    with Classifier(floats, num_threads=1) as one, Classifier(out, num_threads=1) as other:
        pixel_values = normalised(pictures(), one.manifest.preprocess)
        eager = model.forward(torch.from_numpy(pixel_values))
        expected, actual = one.forward(pixel_values), other.forward(pictures())
        for reference in (expected, eager):
            np.testing.assert_array_equal(actual.selected, reference.selected)
            np.testing.assert_array_equal(actual.class_index, reference.class_index)
            np.testing.assert_allclose(actual.residuals, reference.residuals, rtol=0, atol=1e-5)
            np.testing.assert_allclose(actual.logits, reference.logits, rtol=0, atol=1e-4)
        known = [c.forward(x, tasks=["task1"]).logits for c, x in ((one, pixel_values), (other, pictures()))]
        np.testing.assert_allclose(known[1], known[0], rtol=0, atol=1e-4)


def test_both_graphs_name_and_type_their_input(both):
    _, out = both()
    for file in ("first_pass.onnx", "second_pass.onnx"):
        first = onnxruntime.InferenceSession(out / file).get_inputs()[0]
        assert (first.name, first.type, first.shape) == ("images", "tensor(uint8)", ["B", 16, 16, 3])
    spec = read_manifest(out).passes["first_pass"].inputs[0]
    assert (spec.name, spec.dtype, spec.shape) == ("images", "uint8", ("B", 16, 16, 3))


def test_files_and_pictures_are_classified_alike(both, tmp_path):
    floats, out = both()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (17, 60), np.uint8)).save(tmp_path / "b.png")
    sources = [tmp_path / "a.png", tmp_path / "b.png", pictures(1)[0]]
    with Classifier(floats) as one, Classifier(out) as other:
        for expected, actual in zip(one.predict(sources), other.predict(sources), strict=True):
            assert (actual.task, actual.label) == (expected.task, expected.label)
            assert actual.score == pytest.approx(expected.score, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_narrow_graphs_take_bytes_too(both, precision):
    _, out = both("--precision", precision)
    with Classifier(out) as classifier:
        assert classifier.manifest.precision == precision
        assert np.isfinite(classifier.forward(pictures()).logits).all()


def test_the_kind_of_input_that_a_bundle_does_not_take_is_refused(both):
    floats, out = both()
    with Classifier(floats) as one, Classifier(out) as other:
        pixel_values = normalised(pictures(), one.manifest.preprocess)
        with pytest.raises(InputError, match=r"expected shape \[B, 16, 16, 3\], got \[9, 3, 16, 16\]"):
            other.forward(pixel_values)
        with pytest.raises(InputError, match="expected uint8, got float32"):
            other.forward(pictures().astype(np.float32))
        with pytest.raises(InputError, match=r"expected shape \[B, 3, 16, 16\]"):
            one.forward(pictures())


def test_preprocessing_stops_at_bytes_where_the_graph_normalises(both):
    floats, out = both()
    specs = [read_manifest(bundle).preprocess for bundle in (floats, out)]
    pixel_values, images = (pixel_values_from_images(list(pictures()), spec) for spec in specs)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, pictures())
    np.testing.assert_array_equal(normalised(images, specs[1]), pixel_values)
    np.testing.assert_array_equal(nearest_bytes(pixel_values, specs[0]), images)


def test_random_images_for_verification_are_bytes_as_well(both):
    _, out = both()
    spec = read_manifest(out).preprocess
    images = random_pixel_values(spec, 3)
    assert (images.dtype, images.shape) == (np.uint8, (3, 16, 16, 3))
    floats = random_pixel_values(dataclasses.replace(spec, dtype="float32"), 3)
    assert np.abs(normalised(images, spec) - floats).max() < 0.01


def test_eval_and_bench_run_a_bundle_of_bytes(both, tmp_path):
    floats, out = both()
    scores = []
    for bundle in (floats, out):
        arguments = ["eval", "--bundle", bundle, "--data", tmp_path, "--json", tmp_path / "scores.json"]
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0]["confusion"] == scores[1]["confusion"]
    assert scores[0]["joint_accuracy"] == scores[1]["joint_accuracy"]
    arguments = ["bench", "--bundle", out, "--batch", 2, "--rounds", 1, "--json"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert {"plain", "two_pass_top1_mixed"} <= {row["what"] for row in json.loads(done.stdout)["rows"]}


def test_triton_needs_normalised_images(both, tmp_path):
    both()
    arguments = ["export", "--artifact", tmp_path / "merged.safetensors", "--out", tmp_path / "other"]
    arguments += ["--input", "uint8", "--triton", tmp_path / "triton"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 1
    assert "--input float32" in done.stderr
