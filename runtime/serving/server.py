"""`serve`: start Ray, deploy, watch for new bundles, stop in order."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.checksums import check_files
from runtime.errors import BackendError, MassRuntimeError
from runtime.machine import processors
from runtime.manifest import read_manifest
from runtime.serving.engine import bundle_digest
from runtime.serving.gate import KEY_VARIABLE, LIMITS_VARIABLE, limits_to_environment
from runtime.serving.haproxy import prepare
from runtime.serving.metrics import DIRECTORY_VARIABLE
from runtime.serving.settings import MIB, ServeSettings

OBJECT_STORE_BYTES = 200 * MIB  # requests pass through it only when they are large
APP = "mass"
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PASSED_ON = (CALLBACK_VARIABLE, LIMITS_VARIABLE, KEY_VARIABLE, DIRECTORY_VARIABLE)
LEAN = {  # Ray's defaults hand each request from thread to thread and write each log line twice
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}

_LOG = logging.getLogger("runtime.serving")


def run_server(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        InputError: a setting is out of range.
    """
    check_bundle(settings.bundle)
    stopping = threading.Event()
    with running(settings):
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray, which installs its own
            signal.signal(number, lambda *_: stopping.set())
        print(f"Serving {settings.bundle} at http://{settings.host}:{settings.port}/", flush=True)  # noqa: T201
        watch(settings, stopping)
        print("Stopping: accepted requests are answered first.", flush=True)  # noqa: T201


@contextlib.contextmanager
def running(settings: ServeSettings) -> Iterator[None]:
    """Ray and the application, up and warm within the block; stopped in order behind it."""
    scratch = Path(tempfile.mkdtemp(prefix="mass-serve-"))
    os.environ[DIRECTORY_VARIABLE] = str(scratch / "metrics")
    os.environ[LIMITS_VARIABLE] = limits_to_environment(settings)
    os.environ[CALLBACK_VARIABLE] = "runtime.serving.gate.proxy_middlewares"
    for name, value in LEAN.items():
        os.environ.setdefault(name, value)
    if settings.haproxy:
        os.environ |= prepare(scratch / "h", settings)
    try:
        with ray_cluster(settings.address):
            from ray import serve  # noqa: PLC0415 - reads the environment that was set above

            serve.start(
                proxy_location="EveryNode",
                http_options={
                    "host": settings.host,
                    "port": settings.port,
                    "request_timeout_s": settings.deadline + 5,  # the replica itself is asked first
                },
                logging_config=_logging(settings),
            )
            try:
                deploy(settings)
                yield
            finally:
                serve.delete(APP)  # replicas finish what they accepted; newcomers are told to come again
                serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def deploy(settings: ServeSettings) -> None:
    """Deploy the bundle as it is now; replicas of an older one are replaced one by one, when the new ones are warm."""
    from ray import serve  # noqa: PLC0415

    from runtime.serving.deployment import bind  # noqa: PLC0415

    serve.run(bind(settings), name=APP, route_prefix="/", logging_config=_logging(settings))


def watch(settings: ServeSettings, stopping: threading.Event) -> None:
    """Return when asked to stop; until then deploy each new bundle that is whole."""
    served = bundle_digest(settings.bundle)
    while not stopping.wait(settings.watch):
        found = bundle_digest(settings.bundle)
        if found in ("", served):
            continue
        try:
            check_bundle(settings.bundle)
        except MassRuntimeError as error:  # it may still be being copied: the old one goes on
            _LOG.warning("the new bundle is not whole yet: %s", error)
            continue
        served = found
        try:
            deploy(settings)
        except RuntimeError as error:  # Ray keeps the old replicas
            _LOG.error("bundle %s was not deployed: %s", found, error)
        else:
            print(f"Serving bundle {found} now.", flush=True)  # noqa: T201


def check_bundle(bundle: str) -> None:
    """Refuse a bundle that is missing or damaged, before anything is started for it.

    Raises:
        BundleError: what is wrong.
    """
    check_files(Path(bundle), read_manifest(Path(bundle)).files)


@contextlib.contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """A small Ray of this machine alone, on the loopback interface; or the cluster at an address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default replicas yield to every other process
    try:
        import ray  # noqa: PLC0415 - takes seconds
    except ImportError as error:
        raise BackendError(f"Ray cannot be imported ({error}); pip install 'mass-export[serve]'.") from error
    joined = ray.is_initialized()
    if not joined:
        options: dict[str, Any] = {
            "address": "local",  # never one that happens to run here
            "num_cpus": processors(),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
        if address:  # its processes do not inherit the environment of this one
            passed = {name: os.environ[name] for name in (*PASSED_ON, *LEAN) if name in os.environ}
            options = {"address": address, "runtime_env": {"env_vars": passed}}
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()


def _logging(settings: ServeSettings) -> dict[str, Any]:
    """JSON lines; the application writes one for each request itself."""
    return {"encoding": "JSON", "logs_dir": settings.log_dir, "enable_access_log": False}
