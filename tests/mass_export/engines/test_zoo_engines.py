"""The zoo's bundle in half precision: engines are built, and decisions on real images stay those of fp32."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from mass_export.artifact import write_artifact
from mass_export.datasets import load_labelled_images
from mass_export.engine_bundle import build_engines
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.precision_check import LARGEST_FP16, check_decisions, measure_extremes
from mass_export.precision_emulation import emulate_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.spec import TaskInfo
from runtime.bundle import FIRST_PASS, SECOND_PASS
from runtime.checksums import check_files
from runtime.classifier import Classifier
from runtime.engine_settings import EngineSettings
from runtime.engine_spec import Precision
from runtime.manifest import read_manifest

ZOO = Path(__file__).parents[3] / "examples/zoo"
RECIPE = ZOO / "core.yaml"
PER_TASK = 4
QUIET = Progress(quiet=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RECIPE.is_file(), reason="the zoo's recipe is not there"),
]


@pytest.fixture(scope="module")
def zoo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zoo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tasks that share directions
        artifact = merge(load_recipe(RECIPE), QUIET)
    write_artifact(directory / "merged.safetensors", artifact)
    bundle = directory / "bundle"
    export_bundle(artifact, directory / "merged.safetensors", bundle, verify=False, progress=QUIET)
    return bundle


def test_both_passes_build_in_fp16(zoo_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    bundle = Path(shutil.copytree(zoo_bundle, tmp_path / "bundle"))
    built = build_engines(bundle, EngineSettings("tensorrt_rtx", "fp16", batch=(1, 8, 32)), progress=QUIET)
    assert [(engine.spec.pass_name, engine.note) for engine in built] == [
        (FIRST_PASS, "built"),
        (SECOND_PASS, "built"),
    ]
    check_files(bundle, read_manifest(bundle).files)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_decisions_on_real_images_are_those_of_fp32(
    zoo_bundle: Path, tmp_path: Path, precision: Precision
) -> None:
    recipe = load_recipe(RECIPE)
    parts = [
        load_labelled_images(ZOO, TaskInfo(task.name, task.classes), "test").sample(PER_TASK)
        for task in read_manifest(zoo_bundle).tasks
    ]
    images = np.concatenate([part.pixel_values(recipe.preprocess) for part in parts])
    emulate_bundle(zoo_bundle, tmp_path, precision)
    with Classifier(zoo_bundle, "cpu") as classifier:  # equal to the eager model, as the export verifies
        parity = check_decisions(tmp_path, images, classifier.forward, QUIET)
    assert parity.images == PER_TASK * len(parts)
    assert min(parity.equal_sets, parity.equal_tasks, parity.equal_classes) >= 0.96
    assert parity.logits_max_abs <= {"fp16": 0.01, "bf16": 0.1}[precision] * parity.largest_logit
    for extremes in measure_extremes(tmp_path, images[:8]).values():
        assert 0 < extremes.half < LARGEST_FP16 / 100
