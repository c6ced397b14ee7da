import base64
import json
import warnings

import numpy as np
import pytest

from runtime.preprocess import pixel_values_from_images

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    http = pytest.importorskip("tritonclient.http")

pytestmark = pytest.mark.filterwarnings("ignore")  # gevent's


@pytest.fixture
def triton(address):
    client = http.InferenceServerClient(address)
    yield client
    client.close()


def bytes_input(contents, *, binary=True):
    tensor = http.InferInput("image", [len(contents)], "BYTES")
    tensor.set_data_from_numpy(np.array(contents, object), binary_data=binary)
    return tensor


def test_the_real_client_finds_the_model(triton):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("mass")
    assert not triton.is_model_ready("other")
    metadata = triton.get_model_metadata("mass")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["image", "pixel_values"]
    assert triton.get_server_metadata()["name"] == "mass-export"


@pytest.mark.parametrize("binary", [True, False])
def test_the_real_client_gets_the_answers_of_the_classifier(triton, png, direct, engine, binary):
    contents = [png(seed) for seed in range(5)]
    names = [
        "task",
        "label",
        "score",
        "top_labels",
        "top_scores",
        "gates",
        "residuals",
        "route_confidence",
        "unknown",
        "is_unknown",
    ]
    outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in names]
    result = triton.infer(
        "mass", [bytes_input(contents)], outputs=outputs, request_id="7", parameters={"top_k": 2}
    )
    wanted = direct(contents, None, 2)
    texts = {name: np.vectorize(lambda v: v.decode() if isinstance(v, bytes) else v)(result.as_numpy(name))
             for name in ("task", "label", "top_labels")}  # fmt: skip
    assert texts["task"].tolist() == [found["task"] for found in wanted]
    assert texts["label"].tolist() == [found["label"] for found in wanted]
    assert texts["top_labels"].shape == result.as_numpy("top_scores").shape
    assert result.as_numpy("score") == pytest.approx(np.array([found["score"] for found in wanted]), abs=1e-6)
    gates = np.array([[found["gates"][task] for task in engine.tasks] for found in wanted])
    assert result.as_numpy("gates") == pytest.approx(gates, abs=1e-6)
    confidences = np.array([found["route_confidence"] for found in wanted])
    assert result.as_numpy("route_confidence") == pytest.approx(confidences, abs=1e-6)
    assert result.as_numpy("unknown") == pytest.approx(
        np.array([found["unknown"] for found in wanted]), rel=1e-6
    )
    assert result.as_numpy("is_unknown").tolist() == [found["is_unknown"] for found in wanted]
    assert result.get_response()["id"] == "7"


def test_preprocessed_images_and_tasks_are_taken_too(triton, engine):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 30, 20, 3), dtype=np.uint8)
    pixel_values = pixel_values_from_images(list(pixels), engine.classifier.manifest.preprocess)
    tensor = http.InferInput("pixel_values", list(pixel_values.shape), "FP32")
    tensor.set_data_from_numpy(pixel_values)
    result = triton.infer("mass", [tensor], parameters={"tasks": "birds"})
    wanted = engine.classifier.predict(list(pixels), ["birds"])
    assert list(result.as_numpy("label")) == [found.label.encode() for found in wanted]
    assert result.as_numpy("residuals") is None  # one task: no first pass
    assert result.as_numpy("is_unknown") is None


def test_json_alone_suffices(client, png, direct):
    image = base64.b64encode(png()).decode()
    body = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}]}
    answer = client.post("/v2/models/mass/infer", json=body).json()
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs["label"] == [direct([png()])[0]["label"]]
    assert answer["model_name"] == "mass"


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"inputs": []}, 400, "inputs"),
        ({"inputs": [{"name": "image"}]}, 400, "datatype"),
        ({"inputs": [{"name": "image", "datatype": "INT8", "shape": [1], "data": [1]}]}, 400, "INT8"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": ["eA=="]}]}, 400, "needs 2"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["eA=="]}]}, 422, "not an image"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}, 400, "either image"),
        ({"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1], "data": [1]}]}, 422, "shape"),
        ({"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1], "data": ["a"]}]}, 400, "numbers"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1], "data": []}]}, 400, "shape"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["eA=="]}],
          "parameters": {"top_k": 0}}, 400, "top_k"),
    ],
)  # fmt: skip
def test_malformed_requests_are_told_what_is_wrong(client, change, status, told):
    response = client.post("/v2/models/mass/infer", json=change)
    assert response.status_code == status
    assert told in response.json()["detail"]


@pytest.mark.parametrize(
    ("length", "size", "tail"),
    [("999", 8, b""), ("x", 8, b""), (None, 9, b"\x04\0\0\0abcd"), (None, 8, b"\xff\0\0\0abcd")],
)
def test_raw_data_that_does_not_fit_is_refused(client, length, size, tail):
    entry = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [entry]}).encode()
    headers = {"inference-header-content-length": length or str(len(head))}
    response = client.post("/v2/models/mass/infer", content=head + tail, headers=headers)
    assert response.status_code == 400


def test_an_output_that_there_is_not_is_named(client, png):
    image = base64.b64encode(png()).decode()
    body = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}],
        "outputs": [{"name": "caption"}],
    }
    response = client.post("/v2/models/mass/infer", json=body)
    assert response.status_code == 400
    assert "caption" in response.json()["detail"]


@pytest.fixture
def of_bytes(tmp_path, service, toy_module):
    """A client of a bundle whose graphs normalise, and the one that takes floats."""
    import dataclasses

    from starlette.testclient import TestClient

    from runtime.serving.engine import Engine
    from runtime.serving.http_api import build_app
    from runtime.serving.service import Service, run_isolated

    toy_module.write_bundle(
        toy_module.Toy.random(), tmp_path, "tsvm", "uint8", max_tasks=2, unknown_threshold=3.15
    )
    own = Engine(str(tmp_path), provider="cpu", threads=1, batch_size=4)

    async def run(work):
        return run_isolated(own, [work])[0]

    limits = dataclasses.replace(service.limits)
    yield TestClient(build_app(Service("mass", own, service.metrics, limits, run, 4)))
    own.close()


@pytest.mark.parametrize("data", ["list", "raw"])
def test_a_bundle_of_bytes_takes_images_instead_of_pixel_values(of_bytes, engine, data):
    spec = engine.classifier.manifest.preprocess
    pixels = np.random.default_rng(0).integers(0, 256, (2, *spec.image_size, 3), dtype=np.uint8)
    metadata = of_bytes.get("/v2/models/mass").json()["inputs"][1]
    assert metadata == {"name": "images", "datatype": "UINT8", "shape": [-1, *spec.image_size, 3]}
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape)}
    if data == "list":
        answer = of_bytes.post(
            "/v2/models/mass/infer", json={"inputs": [{**tensor, "data": pixels.reshape(-1).tolist()}]}
        )
    else:
        head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": pixels.size}}]}).encode()
        answer = of_bytes.post(
            "/v2/models/mass/infer",
            content=head + pixels.tobytes(),
            headers={"inference-header-content-length": str(len(head))},
        )
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    wanted = engine.classifier.predict(list(pixels))
    assert outputs["label"] == [found.label for found in wanted]
    assert outputs["score"] == pytest.approx([found.score for found in wanted], abs=1e-5)


@pytest.mark.parametrize("value", [256, -1, 1.5, "x"])
def test_what_is_no_byte_is_refused(of_bytes, value):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1], "data": [value]}
    response = of_bytes.post("/v2/models/mass/infer", json={"inputs": [tensor]})
    assert response.status_code == 400
    assert "numbers" in response.json()["detail"]


def test_a_bundle_of_bytes_classifies_files_as_the_other_does(of_bytes, png, direct):
    (answer,) = of_bytes.post("/v1/classify", content=png()).json()
    (wanted,) = direct([png()])
    assert (answer["task"], answer["label"]) == (wanted["task"], wanted["label"])
    assert answer["score"] == pytest.approx(wanted["score"], abs=1e-5)
