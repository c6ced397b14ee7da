"""One pico bundle for all tests of precision and engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

TASKS = 4
made: dict[str, Path] = {}


@pytest.fixture
def exported(pico_files: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `merged.safetensors` and the fp32 `bundle`, made once; do not change it."""
    from mass_export.artifact import read_artifact, write_artifact
    from mass_export.merge import merge
    from mass_export.onnx_export import export_bundle
    from mass_export.progress import Progress
    from mass_export.recipe import load_recipe

    if "bundle" not in made:
        directory, quiet = tmp_path_factory.mktemp("exported"), Progress(quiet=True)
        recipe = load_recipe(
            pico_files(tasks=TASKS, directory=directory, router={"layer": 1, "temperature": 0.5})
        )
        path = directory / "merged.safetensors"
        write_artifact(path, merge(recipe, quiet))
        export_bundle(read_artifact(path), path, directory / "bundle", verify=False, progress=quiet)
        made["bundle"] = directory
    return made["bundle"]


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that the test may change."""
    return Path(shutil.copytree(exported / "bundle", tmp_path / "bundle"))
