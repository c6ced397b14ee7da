"""Classifying opens no socket, and works where there is no network at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import runtime

ROOT = Path(runtime.__file__).parents[1]
REFUSE_SOCKETS = """
import sys

def refuse(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.")) and event != "socket.gethostname":
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
"""
CLASSIFY = """
from runtime.__main__ import main
main()
"""


def arguments(bundle: Path, folder: Path) -> list[str]:
    image = folder / "a.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(image)
    return [str(bundle), str(image), "--json"]


def test_no_socket_is_opened(toy_bundle, tmp_path) -> None:
    command = [sys.executable, "-c", REFUSE_SOCKETS + CLASSIFY, *arguments(toy_bundle(), tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert '"task"' in done.stdout


def test_the_hook_does_refuse_sockets() -> None:
    code = REFUSE_SOCKETS + "import socket; socket.socket()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "socket.__new__" in done.stderr


def test_it_works_without_a_network(toy_bundle, tmp_path) -> None:
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare and the right to make a network namespace")
    command = [unshare, "-rn", sys.executable, "-m", "runtime", *arguments(toy_bundle(), tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert '"task"' in done.stdout
