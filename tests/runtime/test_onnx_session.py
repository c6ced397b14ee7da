"""ONNX Runtime sessions, and the choice of a provider: never another device than the one asked for."""

import sys

import numpy as np
import pytest

from runtime import BackendError, Classifier, backends, onnx_session
from runtime.onnx_session import OnnxSession

onnxruntime = pytest.importorskip("onnxruntime")
no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA"
)


def test_outputs_come_by_name(toy_bundle, toy):
    session = OnnxSession(toy_bundle() / "first_pass.onnx", num_threads=1)
    assert session.provider == "cpu"
    pixel_values = toy.pixel_values(3)
    outputs = session.run({"pixel_values": pixel_values})
    assert list(outputs) == ["residuals"]
    assert np.allclose(outputs["residuals"], toy.residuals(pixel_values), rtol=1e-5)


def test_wrong_feeds_are_backend_errors(toy_bundle, toy):
    session = OnnxSession(toy_bundle() / "first_pass.onnx")
    for feeds in ({}, {"images": toy.pixel_values(1)}, {"pixel_values": toy.pixel_values(1)[:, :2]}):
        with pytest.raises(BackendError, match=r"first_pass\.onnx: ONNX Runtime failed"):
            session.run(feeds)


def test_a_closed_session_says_so(toy_bundle, toy):
    session = OnnxSession(toy_bundle() / "first_pass.onnx")
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run({"pixel_values": toy.pixel_values(1)})


def test_a_file_that_is_no_graph_is_a_backend_error(tmp_path):
    (tmp_path / "g.onnx").write_text("text")
    with pytest.raises(BackendError, match=r"g\.onnx: ONNX Runtime cannot load"):
        OnnxSession(tmp_path / "g.onnx")


@no_cuda
def test_cuda_without_its_build_of_onnxruntime_names_the_package(toy_bundle):
    with pytest.raises(BackendError, match="pip install onnxruntime-gpu"):
        Classifier(toy_bundle(), "cuda")


@no_cuda
def test_auto_takes_the_cpu_where_cuda_is_not_offered(toy_bundle):
    with Classifier(toy_bundle()) as classifier:
        assert classifier.provider == "cpu"


class FallingBack:
    """An InferenceSession that was asked for CUDA and silently took the CPU."""

    def __init__(self, path, options, providers):
        self.path, self.options, self.providers = path, options, providers

    def get_providers(self):
        return ["CPUExecutionProvider"]


@pytest.fixture
def cuda_offered(monkeypatch):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )


@pytest.mark.usefixtures("cuda_offered")
def test_cuda_does_not_round_products_to_tf32(toy_bundle, monkeypatch):
    class Started(FallingBack):
        def get_providers(self):
            return [name for name, _ in self.providers]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Started)
    session = OnnxSession(toy_bundle() / "first_pass.onnx", "cuda")
    assert session._session.providers == [("CUDAExecutionProvider", {"use_tf32": "0"})]


@pytest.mark.usefixtures("cuda_offered")
def test_a_silent_fall_back_is_an_error(toy_bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", FallingBack)
    with pytest.raises(BackendError, match="provider 'cuda' did not start; ONNX Runtime would run on CPU"):
        Classifier(toy_bundle(), "cuda")


@pytest.mark.usefixtures("cuda_offered")
def test_auto_takes_the_cpu_and_says_so_where_cuda_does_not_start(toy_bundle, monkeypatch, caplog):
    true = OnnxSession

    def only_cpu(path, provider, num_threads):
        if provider == "cuda":
            raise BackendError("no driver")
        return true(path, provider, num_threads)

    monkeypatch.setattr(backends, "OnnxSession", only_cpu)
    with caplog.at_level("INFO", "runtime"), Classifier(toy_bundle()) as classifier:
        assert classifier.provider == "cpu"
    assert "CUDA did not start, taking the CPU: no driver" in caplog.text


def test_tensorrt_is_refused_by_name(toy_bundle):
    with pytest.raises(BackendError, match="TensorRT"):
        Classifier(toy_bundle(), "tensorrt")


def test_without_onnxruntime_the_package_is_named(toy_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        onnx_session.is_offered("cpu")
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        Classifier(toy_bundle(), "cpu")
