"""A toy bundle behind the application without Ray: batches of one request, in the same process."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from runtime.errors import MassRuntimeError
from runtime.serving.engine import Engine
from runtime.serving.http_api import build_app
from runtime.serving.metrics import Metrics
from runtime.serving.service import Service, run_isolated
from runtime.serving.settings import Limits

UNKNOWN_THRESHOLD = 3.15  # some of the random images are above, some below


def _toys():
    """The toy bundles of the runtime's tests."""
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).parents[1] / "runtime/conftest.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["toys"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy_module():
    return _toys()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, toy_module) -> Path:
    """One that tells unknown images, as a calibrated one does."""
    pytest.importorskip("onnx")
    toys = toy_module
    directory = tmp_path_factory.mktemp("bundle")
    toys.write_bundle(toys.Toy.random(), directory, "tsvm", max_tasks=2, unknown_threshold=UNKNOWN_THRESHOLD)
    return directory


@pytest.fixture(scope="session")
def engine(bundle):
    engine = Engine(str(bundle), provider="cpu", threads=1, batch_size=4)
    yield engine
    engine.close()


@pytest.fixture
def service(engine):
    async def run(work):
        (found,) = run_isolated(engine, [work])
        if isinstance(found, MassRuntimeError):
            raise found
        return found

    limits = Limits(max_body_mib=0.5, max_pixels=10_000, max_images=6, deadline=20, body_timeout=2)
    return Service("mass", engine, Metrics("here", CollectorRegistry()), limits, run, 4)


@pytest.fixture
def client(service):
    return TestClient(build_app(service))


def encoded(seed=0, size=(30, 20), kind="PNG", mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


@pytest.fixture
def png():
    return encoded


@pytest.fixture
def direct(engine):
    """`direct(contents, tasks=None, top_k=5)`: what the classifier itself answers, as dicts."""

    def predict(contents, tasks=None, top_k=5):
        images = [Image.open(io.BytesIO(content)) for content in contents]
        return [found.to_dict() for found in engine.classifier.predict(images, tasks, top_k)]

    return predict


@pytest.fixture
def address(service):
    """The application behind a real HTTP server: `127.0.0.1:PORT`."""
    import socket
    import threading
    import time

    uvicorn = pytest.importorskip("uvicorn")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(service), log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()
