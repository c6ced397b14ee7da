"""Merging, exporting and examining local files opens no socket."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from pathlib import Path

def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.", "http.")):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
from mass_export.cli import main
place = Path(sys.argv[1])
merged, bundle = str(place / "merged.safetensors"), str(place / "engines")
for command in (
    ["merge", str(place / "recipe.yaml"), "--out", merged, "-q"],
    ["export", "--artifact", merged, "--out", bundle, "-q"],
    ["inspect", bundle, "-q"],
    ["doctor", bundle, "-q"],
):
    main(command, standalone_mode=False)
"""


def test_no_connection_is_made(pico_files) -> None:
    recipe = pico_files(2, router="default")
    done = subprocess.run(
        [sys.executable, "-c", CODE, recipe.parent], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing found" in done.stdout
