"""Images that ONNX Runtime keeps on a device for both passes; here the device is the CPU."""

import numpy as np
import pytest

from runtime import BackendError, Classifier, onnx_session
from runtime.onnx_session import OnnxSession, StagedImages


def test_bound_runs_equal_plain_ones(toy_bundle, toy):
    session, pixel_values = OnnxSession(toy_bundle() / "first_pass.onnx", num_threads=1), toy.pixel_values(5)
    plain = session.run({"pixel_values": pixel_values})
    bound = session.run({"pixel_values": StagedImages(pixel_values, "cpu")})
    assert np.array_equal(bound["residuals"], plain["residuals"])


def test_rows_are_sent_again_only_where_some_are_missing(toy):
    staged = StagedImages(toy.pixel_values(4), "cpu")
    assert staged[[0, 1, 2, 3]] is staged
    assert staged[0:4] is staged
    picked = staged[[3, 1]]
    assert np.array_equal(picked.host, staged.host[[3, 1]])
    assert picked.shape == (2, *staged.shape[1:])


def test_a_classifier_stages_its_images_once_for_both_passes(toy_bundle, toy, monkeypatch):
    made = []

    def stage(_self, pixel_values):
        made.append(StagedImages(pixel_values, "cpu"))
        return made[-1]

    pixel_values = toy.pixel_values(4)
    with Classifier(toy_bundle(), "cpu", mode="top1") as classifier:
        expected = classifier.forward(pixel_values)
        monkeypatch.setattr(OnnxSession, "stage", stage)
        result = classifier.forward(pixel_values)
    assert len(made) == 1
    assert np.array_equal(result.logits, expected.logits)


def test_failures_of_bound_runs_are_backend_errors(toy_bundle, toy):
    session = OnnxSession(toy_bundle() / "first_pass.onnx")
    with pytest.raises(BackendError, match=r"first_pass\.onnx: ONNX Runtime failed"):
        session.run({"pixel_values": StagedImages(toy.pixel_values(2)[:, :2], "cpu")})


def test_a_bundle_without_engines_takes_onnx_runtimes_tensorrt_where_it_has_one(toy_bundle, monkeypatch):
    asked = []

    class Recorded:
        max_batch = None

        def __init__(self, path, provider, _threads):
            asked.append((path.name, provider))
            self.provider = provider

    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)  # no TensorRT of Python's
    monkeypatch.setattr("runtime.backends.OnnxSession", Recorded)
    monkeypatch.setattr("runtime.backends.is_offered", lambda provider: provider == "tensorrt")
    assert Classifier(toy_bundle(), "tensorrt").provider == "tensorrt"
    assert asked == [("first_pass.onnx", "tensorrt"), ("second_pass.onnx", "tensorrt")]
    assert onnx_session.is_offered("cpu")
