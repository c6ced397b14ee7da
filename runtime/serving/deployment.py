"""The Ray Serve application: replicas that hold a model each and batch the requests of all clients.

`application` is what a Serve configuration file names (`runtime.serving.deployment:application`); its arguments are
the fields of `ServeSettings`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from runtime.errors import MassRuntimeError
from runtime.prediction import Prediction
from runtime.serving.engine import Engine, Work, bundle_digest
from runtime.serving.http_api import build_app
from runtime.serving.metrics import DIRECTORY_VARIABLE, Metrics
from runtime.serving.service import Service, run_isolated
from runtime.serving.settings import ServeSettings, settings_from

DEPLOYMENT = "Classifier"
STUCK_S = 60.0
MAX_WAIT_S = 0.25
SMOOTHING = 0.2


@serve.ingress()
class Replica:
    """One replica: its own model, its own thread for it, and the application in front."""

    def __init__(self, settings: ServeSettings, version: str) -> None:
        """Load and warm up.

        Args:
            settings: of the server.
            version: of the bundle when it was deployed; another one makes Ray replace the replicas.
        """
        self._settings = settings
        if directory := os.environ.get(DIRECTORY_VARIABLE):
            Path(directory).mkdir(parents=True, exist_ok=True)
        self._engine = Engine(
            settings.bundle,
            provider=settings.provider,
            threads=settings.replica_threads(),
            batch_size=settings.batch_size,
        )
        self._metrics = Metrics(socket.gethostname())
        self._thread = ThreadPoolExecutor(1, "model")
        self._busy_since: float | None = None
        self._deployed = version
        self._image_s = 0.0  # time of an image in the model, smoothed
        batching: Any = self._batched  # Ray adds the setters
        batching.set_max_batch_size(settings.batch_size)
        self._wait = batching.set_batch_wait_timeout_s
        self._wait(settings.batch_wait)
        self._service = Service(
            settings.name, self._engine, self._metrics, settings, self._run, settings.batch_size
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray when the replica is ready."""
        return build_app(self._service)

    async def _run(self, work: Work) -> list[Prediction]:
        found: list[Prediction] | MassRuntimeError = await self._batched(work)
        if isinstance(found, MassRuntimeError):
            raise found
        return found

    @serve.batch(batch_size_fn=lambda works: sum(map(len, works)))
    async def _batched(self, works: Sequence[Work]) -> list[list[Prediction] | MassRuntimeError]:
        """Run a batch. Meanwhile the next one may wait for as long as this one takes: sooner it cannot begin."""
        start = self._busy_since = time.monotonic()
        images = sum(map(len, works))
        self._wait(min(MAX_WAIT_S, max(self._settings.batch_wait, images * self._image_s)))
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._thread, run_isolated, self._engine, works
            )
        finally:
            self._busy_since = None
            self._wait(self._settings.batch_wait)
        elapsed = time.monotonic() - start
        self._image_s += SMOOTHING * (elapsed / images - self._image_s)
        self._metrics.batch(images, elapsed)
        return found

    def check_health(self) -> None:
        """Called by Ray now and then; a batch that never ends makes it replace the replica."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > max(STUCK_S, 2 * self._settings.deadline):
            raise RuntimeError("a batch does not end")


def application(arguments: dict[str, Any]) -> Application:
    """The application of plain values: for `serve.run`, or named in a configuration file.

    Raises:
        InputError: an argument is unknown, missing or out of range.
    """
    return bind(settings_from(ServeSettings, arguments))


def bind(settings: ServeSettings) -> Application:
    """The application of settings, for the bundle as it is now."""
    least, most = settings.replica_range
    scaling: dict[str, Any] = {"num_replicas": most}
    if settings.autoscale is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": max(1, settings.max_ongoing // 4),
                "upscale_delay_s": 3,
                "downscale_delay_s": 60,
            }
        }
    deployment: Any = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        # Of a processor a replica reserves little: while a new bundle comes in, old and new ones live side by side.
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=settings.deadline + 5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        **scaling,
    )
    bound: Application = deployment.bind(settings, bundle_digest(settings.bundle))
    return bound
