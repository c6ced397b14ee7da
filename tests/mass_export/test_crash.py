"""A short run of the crash test: real exports are killed, and what is there answers as the old or the new bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "crash_test.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_exports_leave_a_bundle_that_answers(pico_files) -> None:
    command = [sys.executable, SCRIPT, "--recipe", pico_files(2, router="default")]
    command += ["--kills", "6", "--stride", "5", "--rounds", "2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bundle"]["killed before a file operation"] > 5
    assert report["left by killed exports after one that was not"] == []


def test_a_full_disk_is_one_clear_error_and_the_old_bundle_stays(pico_bundle) -> None:
    resource = pytest.importorskip("resource")
    from mass_export.artifact import read_artifact
    from mass_export.errors import ExportError
    from mass_export.onnx_export import export_bundle
    from mass_export.progress import Progress
    from runtime import Classifier

    _, _, bundle = pico_bundle(tasks=2, router="default")
    path = bundle.parent / "merged.safetensors"
    artifact = read_artifact(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the kernel refuses longer files
    try:
        with pytest.raises(ExportError, match=r"cannot be written .*what was there is unchanged"):
            export_bundle(artifact, path, bundle, verify=False, progress=Progress(quiet=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in bundle.parent.iterdir() if file.name.startswith(".bundle")] == []
    Classifier(bundle, "cpu").close()
