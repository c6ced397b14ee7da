"""The same input gives the same bytes; the order of tasks and the number of threads change nothing but the layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mass_export.artifact import read_artifact, write_artifact
from mass_export.merge import merge
from mass_export.onnx_export import write_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime import Classifier
from runtime.checksums import sha256_of_file

QUIET = Progress(quiet=True)
TOLERANCE = 1e-6
MERGE_AND_EXPORT = """
import sys
from pathlib import Path
import torch
from mass_export.artifact import read_artifact, write_artifact
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
torch.set_num_threads(int(sys.argv[3]))
quiet, out = Progress(quiet=True), Path(sys.argv[2])
write_artifact(out / "merged.safetensors", merge(load_recipe(Path(sys.argv[1])), quiet))
artifact = read_artifact(out / "merged.safetensors")
for precision in ("fp32", "fp16", "int8"):
    bundle = out / precision
    export_bundle(artifact, out / "merged.safetensors", bundle, verify=False, progress=quiet, precision=precision)
"""


def built(recipe: Path, out: Path, *, threads: int, seed: int) -> Path:
    """Merge and export in a process of its own."""
    out.mkdir(parents=True)
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", MERGE_AND_EXPORT, recipe, out, threads]
    subprocess.run(list(map(str, command)), check=True, env=environment, cwd=Path(__file__).parents[2])
    return out


def checksums(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): sha256_of_file(p) for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_merge_and_export_give_the_same_bytes_again_and_the_same_numbers_with_other_threads(
    pico_files, tmp_path
) -> None:
    recipe = pico_files(3, rank=6)
    first = built(recipe, tmp_path / "a" / "out", threads=1, seed=1)
    again = built(recipe, tmp_path / "elsewhere" / "out", threads=1, seed=2)
    assert len(checksums(first)) == 17
    assert checksums(first) == checksums(again)
    more = built(recipe, tmp_path / "c" / "out", threads=4, seed=3)
    one, four = (load_file(out / "merged.safetensors") for out in (first, more))
    assert one.keys() == four.keys()
    assert max(float((one[name] - four[name]).abs().max()) for name in one) <= TOLERANCE


def with_tasks_in_order(recipe: Path, order: list[int]) -> Path:
    data: dict[str, Any] = yaml.safe_load(recipe.read_text())
    data["tasks"] = [data["tasks"][index] for index in order]
    path = recipe.with_name(f"{''.join(map(str, order))}.yaml")
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "settings", [{"rank": 7}, {"rank": 7, "base_merge": "isotropic"}, {"router": "default"}]
)
def test_the_order_of_tasks_changes_the_layout_alone(pico_files, settings) -> None:
    recipe, order = pico_files(4, **settings), [2, 0, 3, 1]
    images = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
    towers, answers = [], []
    for path in (recipe, with_tasks_in_order(recipe, order)):
        file, bundle = path.with_suffix(".safetensors"), path.with_suffix(".bundle")
        write_artifact(file, merge(load_recipe(path), QUIET))
        artifact = read_artifact(file)
        towers.append(artifact.merged)
        bundle.mkdir()
        write_bundle(artifact, file, bundle, QUIET)
        with Classifier(bundle, "cpu", num_threads=1, mode="weighted", threshold=0.2) as classifier:
            result = classifier.forward(images)
            names = np.array(classifier.tasks)
            by_name = np.argsort(names)
            parts = {t.name: result.logits[:, t.start : t.stop] for t in classifier.manifest.tasks}
            assert result.residuals is not None
            answers.append(
                (
                    names[result.task_index].tolist(),
                    result.class_index.tolist(),
                    result.residuals[:, by_name],
                    np.concatenate([parts[name] for name in sorted(parts)], axis=1),
                )
            )
    assert all(float((towers[0][n] - towers[1][n]).abs().max()) <= TOLERANCE for n in towers[0])
    assert answers[0][:2] == answers[1][:2]
    np.testing.assert_allclose(answers[0][2], answers[1][2], atol=5e-6)
    np.testing.assert_allclose(answers[0][3], answers[1][3], atol=5e-5)  # logits of order 10


def test_the_order_of_tensors_in_a_checkpoint_changes_nothing(pico_files, tmp_path) -> None:
    recipe = pico_files(2)
    write_artifact(tmp_path / "before.safetensors", merge(load_recipe(recipe), QUIET))
    for name in ("base", "task0", "task1"):
        tensors = {key: t.clone() for key, t in load_file(tmp_path / f"{name}.safetensors").items()}
        torch.save(dict(reversed(tensors.items())), tmp_path / "reversed.pt")
        (tmp_path / "reversed.pt").replace(tmp_path / f"{name}.safetensors")
    write_artifact(tmp_path / "after.safetensors", merge(load_recipe(recipe), QUIET))
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_json_of_a_manifest_has_no_time_and_no_place(pico_bundle, tmp_path) -> None:
    _, _, bundle = pico_bundle(tasks=2, router="default")
    text = (bundle / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert not any(mark in json.dumps(json.loads(text)["provenance"]) for mark in ("time", "date", "host"))
