"""The Open Inference Protocol, version 2 over REST, with Triton's extension for binary tensors.

Inputs: `image` BYTES [N], the content of image files (in JSON as base64), or what the bundle takes: `pixel_values` FP32
[N, 3, H, W], or of a bundle of bytes `images` UINT8 [N, H, W, 3].
Outputs: `task`, `label` BYTES [N], `score` FP32 [N], `top_labels` BYTES and `top_scores` FP32 [N, top_k] (padded with
"" and 0), `gates` and, unless one task was asked for, `residuals` FP32 [N, T], tasks in the order of the metadata, and
`route_confidence` FP32 [N]; where the bundle can tell, `unknown` FP32 [N], and with a threshold `is_unknown` BOOL [N].
Parameters of a request: `tasks` (names, separated by commas) and `top_k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

import runtime
from runtime.prediction import Prediction
from runtime.serving.problems import RequestProblem
from runtime.serving.service import Service
from runtime.serving.tensor_codec import (
    HEADER_LENGTH,
    Tensor,
    bytes_array,
    decode_request,
    encode_response,
)

OUTPUTS = {
    "task": ("BYTES", [-1]),
    "label": ("BYTES", [-1]),
    "score": ("FP32", [-1]),
    "top_labels": ("BYTES", [-1, -1]),
    "top_scores": ("FP32", [-1, -1]),
    "gates": ("FP32", [-1, -1]),
    "residuals": ("FP32", [-1, -1]),
    "route_confidence": ("FP32", [-1]),
    "unknown": ("FP32", [-1]),
    "is_unknown": ("BOOL", [-1]),
}
DATATYPES = {"float32": "FP32", "uint8": "UINT8"}
VERSION = "1"


def protocol_routes(service: Service) -> APIRouter:
    """The routes below `/v2`."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    spec = service.engine.classifier.manifest.preprocess

    def require(model: str, version: str = VERSION) -> None:
        if model != service.name or version != VERSION:
            raise RequestProblem(
                404, f"model {model!r}, version {version}: here is {service.name!r}, version {VERSION}."
            )

    @routes.get("", response_model=None)
    async def server() -> dict[str, Any]:
        return {"name": "mass-export", "version": runtime.__version__, "extensions": ["binary_tensor_data"]}

    @routes.get("/health/live", response_model=None)
    async def live() -> dict[str, bool]:
        return {"live": True}

    @routes.get("/health/ready", response_model=None)
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @routes.get("/models/{model}/ready", response_model=None)
    @routes.get("/models/{model}/versions/{version}/ready", response_model=None)
    async def model_ready(model: str, version: str = VERSION) -> dict[str, Any]:
        require(model, version)
        return {"name": model, "ready": True}

    @routes.get("/models/{model}", response_model=None)
    @routes.get("/models/{model}/versions/{version}", response_model=None)
    async def metadata(model: str, version: str = VERSION) -> dict[str, Any]:
        require(model, version)
        return {
            "name": model,
            "versions": [VERSION],
            "platform": "mass-export",
            "inputs": [
                {"name": "image", "datatype": "BYTES", "shape": [-1]},
                {
                    "name": spec.input_name,
                    "datatype": DATATYPES[spec.dtype],
                    "shape": [-1, *spec.input_shape],
                },
            ],
            "outputs": [
                {"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in OUTPUTS.items()
            ],
            "parameters": {"tasks": ",".join(service.engine.tasks), "bundle": service.engine.digest},
        }

    @routes.post("/models/{model}/infer", response_model=None)
    @routes.post("/models/{model}/versions/{version}/infer", response_model=None)
    async def infer(request: Request, model: str, version: str = VERSION) -> Response:
        require(model, version)
        asked = decode_request(await request.body(), request.headers.get(HEADER_LENGTH))
        parameters = asked.parameters
        tasks = [name.strip() for name in str(parameters.get("tasks", "")).split(",") if name.strip()]
        top_k = parameters.get("top_k", 5)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise RequestProblem(400, f"parameters: top_k: expected an integer >= 1, got {top_k!r}.")
        found = await _classified(service, asked.inputs, tasks, top_k)
        outputs = _outputs(found, service.engine.tasks)
        body, header_length = encode_response(model, VERSION, asked, outputs)
        headers = {} if header_length is None else {HEADER_LENGTH: str(header_length)}
        kind = "application/json" if header_length is None else "application/octet-stream"
        return Response(body, media_type=kind, headers=headers)

    return routes


async def _classified(
    service: Service, inputs: dict[str, Tensor], tasks: Sequence[str], top_k: int
) -> list[Prediction]:
    if set(inputs) == {"image"}:
        images = inputs["image"]
        if images.datatype != "BYTES":
            raise RequestProblem(400, f"image: expected datatype BYTES, got {images.datatype}.")
        if not 1 <= images.array.size <= service.limits.max_images:
            raise RequestProblem(
                413, f"image: expected 1..{service.limits.max_images}, got {images.array.size}."
            )
        named = [(str(index), content) for index, content in enumerate(images.array.reshape(-1).tolist())]
        return await service.classify(named, tasks, top_k)
    spec = service.engine.classifier.manifest.preprocess
    name, datatype = spec.input_name, DATATYPES[spec.dtype]
    if set(inputs) == {name}:
        pixels = inputs[name]
        if pixels.datatype != datatype:
            raise RequestProblem(400, f"{name}: expected datatype {datatype}, got {pixels.datatype}.")
        if pixels.array.shape[0] > service.limits.max_images:
            raise RequestProblem(413, f"{name}: at most {service.limits.max_images} images a request.")
        return await service.classify_pixels(pixels.array, tasks, top_k)
    raise RequestProblem(400, f"inputs: expected either image or {name}, got {sorted(inputs)}.")


def _outputs(found: Sequence[Prediction], tasks: Sequence[str]) -> dict[str, NDArray[Any]]:
    width = max(len(prediction.alternatives) for prediction in found)
    labels = [[label for _, label, _ in p.alternatives] + [""] * (width - len(p.alternatives)) for p in found]
    scores = [[score for *_, score in p.alternatives] + [0.0] * (width - len(p.alternatives)) for p in found]
    outputs = {
        "task": bytes_array([p.task for p in found]),
        "label": bytes_array([p.label for p in found]),
        "score": np.array([p.score for p in found], np.float32),
        "top_labels": bytes_array([label for row in labels for label in row]).reshape(len(found), width),
        "top_scores": np.array(scores, np.float32),
        "gates": np.array([[p.gates[task] for task in tasks] for p in found], np.float32),
    }
    known = [p.residuals for p in found if p.residuals is not None]
    if known:
        outputs["residuals"] = np.array([[row[task] for task in tasks] for row in known], np.float32)
    if found[0].route_confidence is not None:
        outputs["route_confidence"] = np.array([p.route_confidence for p in found], np.float32)
    if found[0].unknown is not None:  # one request's images are all told, or none
        outputs["unknown"] = np.array([p.unknown for p in found], np.float32)
    if found[0].is_unknown is not None:
        outputs["is_unknown"] = np.array([p.is_unknown for p in found], np.bool_)
    return outputs
