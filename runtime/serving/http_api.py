"""The HTTP application: `/v1/classify`, health, metrics, the page; `/v2` is in `inference_protocol`."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import runtime
from runtime.serving.gate import KEY_VARIABLE, SERVED_BY, Gate
from runtime.serving.inference_protocol import protocol_routes
from runtime.serving.intake import read_request
from runtime.serving.page import PAGE_HEADERS, page
from runtime.serving.problems import PROBLEM_JSON, RequestProblem
from runtime.serving.service import Service, answer_from_prediction

_LOG = logging.getLogger("ray.serve")
_TEXT = {"type": "string"}
_OPTIONS = {
    "tasks": {"type": "array", "items": _TEXT, "description": "Only these may answer; by default all."},
    "top_k": {"type": "integer", "default": 5, "minimum": 1, "description": "Labels for each image."},
}
_BINARY = {"type": "string", "format": "binary"}
_CLASSIFY_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": {**_BINARY, "description": "One image; tasks and top_k in the query."}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": _BINARY}, **_OPTIONS},
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "additionalProperties": False,
                "properties": {
                    "images": {"type": "array", "items": {**_TEXT, "contentEncoding": "base64"}},
                    **_OPTIONS,
                },
            }
        },
    },
}
_QUERY = [{"name": name, "in": "query", "schema": schema} for name, schema in _OPTIONS.items()]


class Alternative(BaseModel):
    """A class of the task that answered."""

    task: str
    label: str
    score: float


class Answer(Alternative):
    """The answer for one image, as `python -m runtime --json` prints it."""

    image: str
    alternatives: list[Alternative]
    gates: dict[str, float]
    residuals: dict[str, float] | None
    route_margin: float | None
    route_confidence: float | None
    unknown: float | None
    is_unknown: bool | None


class Problem(BaseModel):
    """Why there is no answer (RFC 9457)."""

    title: str
    status: int
    detail: str


def build_app(service: Service) -> FastAPI:
    """The application of one replica."""
    app = FastAPI(
        title="mass-export",
        version=runtime.__version__,
        description="Classify images with one model for several tasks. Errors are problems as of RFC 9457; those with "
        "`Retry-After` may be tried again.",
        docs_url=None,  # the usual pages load scripts from elsewhere
        redoc_url=None,
        responses={
            status: {"model": Problem, "content": {PROBLEM_JSON: {}}}
            for status in (400, 413, 422, 429, 503, 504)
        },
    )
    app.add_exception_handler(RequestProblem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_middleware(Gate, limits=service.limits, api_key=os.environ.get(KEY_VARIABLE))
    app.add_middleware(Observer, service=service)

    @app.post(
        "/v1/classify",
        response_model=None,
        responses={200: {"model": list[Answer]}},
        openapi_extra={"requestBody": _CLASSIFY_BODY, "parameters": _QUERY},
    )
    async def classify(request: Request) -> Response:
        """Classify one or several images."""
        intake = await read_request(request, service.limits)
        found = await service.classify(intake.images, intake.tasks, intake.top_k)
        named = zip(intake.images, found, strict=True)
        answers = [answer_from_prediction(name, prediction) for (name, _), prediction in named]
        return Response(json.dumps(answers), media_type="application/json")

    @app.get("/v1/model", response_model=None)
    async def model() -> dict[str, Any]:
        """Tasks and classes, image size, provider, and the bundle's version."""
        return {"name": service.name, **service.engine.description()}

    @app.get("/healthz", response_model=None)
    async def healthz() -> dict[str, str]:
        """The server runs."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=None)
    async def readyz() -> dict[str, str]:
        """A replica with a warm model answers."""
        return {"status": "ready", "bundle": service.engine.digest}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus metrics of this node's replicas."""
        text, kind = service.metrics.exposition()
        return Response(text, headers={"content-type": kind})

    @app.get("/", include_in_schema=False, response_model=None)
    async def index() -> Response:
        return Response(page(), headers=PAGE_HEADERS)

    app.include_router(protocol_routes(service))
    return app


class Observer:
    """An ASGI layer that counts, logs and marks every response of the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Wrap."""
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # the client went away

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (SERVED_BY, self._service.engine.digest.encode()),
                    (b"cache-control", b"no-store"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        finally:
            # The template of the route, not the path: strangers must not make new series.
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - start
            self._service.metrics.request(route, status, seconds)
            if route in ("/v1/classify", "/v2/models/{model}/infer") or status >= 500:
                fields = {"http_route": route, "http_status": status, "latency_ms": round(1000 * seconds, 2)}
                _LOG.info("request", extra=fields)


async def _on_problem(_: Request, error: Exception) -> Response:
    problem = error if isinstance(error, RequestProblem) else RequestProblem(500, "the server failed.")
    return Response(problem.body(), problem.status, headers=problem.headers())


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = f"{request.method} {request.url.path}: {getattr(error, 'detail', 'failed')}; see /openapi.json."
    return await _on_problem(request, RequestProblem(status, detail))


async def _on_invalid(request: Request, error: Exception) -> Response:
    return await _on_problem(request, RequestProblem(400, " ".join(str(error).split())))
