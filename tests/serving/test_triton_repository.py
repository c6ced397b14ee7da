"""The repository without Triton: configurations parsed by the official definitions, steps run in their order."""

import dataclasses
import importlib.util
import sys
import types

import numpy as np
import onnxruntime
import pytest

from mass_export.errors import ExportError
from mass_export.triton_repository import write_triton_repository
from runtime.bundle import MANIFEST_FILE
from runtime.manifest import json_from_manifest, read_manifest

text_format = pytest.importorskip("google.protobuf.text_format")
pytestmark = pytest.mark.filterwarnings("ignore")  # gevent's, grpc's


@pytest.fixture
def repository(bundle, tmp_path):
    return write_triton_repository(bundle, tmp_path / "repository")


@pytest.fixture
def configs(repository):
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    found = {}
    for file in repository.glob("*/config.pbtxt"):
        found[file.parent.name] = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
    return found


class Backend(types.ModuleType):
    """What Triton's Python backend gives to a model."""

    @dataclasses.dataclass
    class Tensor:
        name: str
        array: np.ndarray

        def as_numpy(self):
            return self.array

    @dataclasses.dataclass
    class InferenceResponse:
        output_tensors: list
        error: object = None

    class TritonError(Exception):
        pass

    @staticmethod
    def get_input_tensor_by_name(request, name):
        return next(tensor for tensor in request if tensor.name == name)


def python_step(directory, inputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("model", directory / "1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(directory), "model_version": "1"})
    (response,) = model.execute([[Backend.Tensor(name, array) for name, array in inputs.items()]])
    assert response.error is None
    return {tensor.name: tensor.array for tensor in response.output_tensors}


def check(config, direction, tensors):
    """Names, types and shapes are those that the configuration promises."""
    numpy_types = {
        "TYPE_FP32": np.float32,
        "TYPE_INT64": np.int64,
        "TYPE_STRING": object,
        "TYPE_BOOL": np.bool_,
    }
    promised = {tensor.name: tensor for tensor in getattr(config, direction)}
    assert promised.keys() == tensors.keys()
    for name, tensor in promised.items():
        kind = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        assert tensors[name].dtype == numpy_types[kind[tensor.data_type].name]
        assert list(tensors[name].shape[1:]) == list(tensor.dims)


def reshaped(config, outputs):
    """What Triton makes of a graph's outputs: those with a `reshape` lack dimensions there."""
    shapes = {tensor.name: [*tensor.dims] for tensor in config.output if tensor.HasField("reshape")}
    assert all(outputs[name].ndim == 1 for name in shapes)
    return {
        name: array.reshape(len(array), *shapes[name]) if name in shapes else array
        for name, array in outputs.items()
    }


def test_the_ensemble_answers_as_the_classifier(repository, configs, engine, monkeypatch):
    height, width = engine.image_size
    pixel_values = np.random.default_rng(0).normal(size=(9, 3, height, width)).astype(np.float32)
    values = {"pixel_values": pixel_values}
    for step in configs["mass"].ensemble_scheduling.step:
        config = configs[step.model_name]
        inputs = {theirs: values[ours] for theirs, ours in step.input_map.items()}
        check(config, "input", inputs)
        directory = repository / step.model_name
        if config.backend == "onnxruntime":
            session = onnxruntime.InferenceSession(str(directory / "1/model.onnx"))
            names = [output.name for output in session.get_outputs()]
            outputs = reshaped(config, dict(zip(names, session.run(names, inputs), strict=True)))
        else:
            outputs = python_step(directory, inputs, monkeypatch)
        check(config, "output", outputs)
        values |= {ours: outputs[theirs] for theirs, ours in step.output_map.items()}
    result = engine.classifier.forward(pixel_values)
    assert {len(row) for row in (np.flatnonzero(s) for s in result.selected)} == {
        1,
        2,
    }  # padded and full sets
    np.testing.assert_allclose(values["logits"], result.logits, rtol=1e-4, atol=1e-5)
    assert [task.decode() for task in values["task"][:, 0]] == [engine.tasks[i] for i in result.task_index]
    labels = [
        engine.classifier.classes[engine.tasks[t]][c]
        for t, c in zip(result.task_index, result.class_index, strict=True)
    ]
    assert [label.decode() for label in values["label"][:, 0]] == labels
    assert {output.name for output in configs["mass"].output} >= {"unknown", "is_unknown"}
    np.testing.assert_allclose(values["unknown"][:, 0], result.unknown, rtol=1e-5)
    threshold = engine.classifier.router.unknown_threshold
    assert values["is_unknown"][:, 0].tolist() == (result.unknown > threshold).tolist()


def test_every_model_has_a_version_and_its_own_name(repository, configs):
    assert set(configs) == {"mass", "mass_first_pass", "mass_routing", "mass_second_pass", "mass_answer"}
    for name, config in configs.items():
        assert config.name == name
        assert config.max_batch_size > 0
        assert (repository / name / "1").is_dir()


def test_a_directory_with_other_things_is_left_alone(bundle, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ExportError, match="empty"):
        write_triton_repository(bundle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_routers_that_verify_cannot_become_an_ensemble(bundle, tmp_path):
    manifest = read_manifest(bundle)
    router = dataclasses.replace(manifest.router, mode="top1", verify_margin=0.1)
    (tmp_path / MANIFEST_FILE).write_text(json_from_manifest(dataclasses.replace(manifest, router=router)))
    with pytest.raises(ExportError, match="verif"):
        write_triton_repository(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
