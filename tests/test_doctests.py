from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in ("runtime", "mass_export") for path in (ROOT / name).glob("*.py"))
WITH_EXAMPLES = [path for path in FILES if ">>> " in path.read_text(encoding="utf-8")]


@pytest.fixture
def engines(pico_files, tmp_path, monkeypatch):
    """A directory with a bundle `engines/` and an image `cat.jpg`, as the examples name them."""
    from mass_export.artifact import write_artifact
    from mass_export.merge import merge
    from mass_export.onnx_export import export_bundle
    from mass_export.progress import Progress
    from mass_export.recipe import load_recipe

    artifact, file = merge(load_recipe(pico_files()), Progress(quiet=True)), tmp_path / "merged.safetensors"
    write_artifact(file, artifact)
    export_bundle(artifact, file, tmp_path / "engines", verify=False, progress=Progress(quiet=True))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)


def test_the_public_classes_and_the_arithmetic_have_examples():
    names = {f"{path.parent.name}.{path.stem}" for path in WITH_EXAMPLES}
    assert names >= {"runtime.classifier", "runtime.routing", "runtime.cores", "runtime.preprocess"}


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_examples_in_docstrings_print_what_they_show(path):
    module = importlib.import_module(f"{path.parent.name}.{path.stem}")
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
