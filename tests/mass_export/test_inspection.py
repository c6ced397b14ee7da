"""`mass inspect`: figures of artifacts and bundles of pico models."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from mass_export.artifact import Artifact, write_artifact
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.cli import main
from mass_export.errors import ArtifactError
from mass_export.inspection import inspect
from mass_export.inspection_report import Inspection, json_from_inspection
from mass_export.inspection_tables import print_inspection
from mass_export.merge import merge
from mass_export.onnx_export import write_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.subspaces import stack_geometry
from runtime.errors import BundleError

QUIET = Progress(quiet=True)
TASKS = 3
CLASSES = [3, 4, 5]


def orthonormal_rows(rank: int, width: int, seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, rank)))
    return q.T


def write_merged(recipe: Path) -> Path:
    path = recipe.parent / "merged.safetensors"
    write_artifact(path, merge(load_recipe(recipe), QUIET))
    return path


def export(recipe: Path, artifact: Artifact | None = None) -> Path:
    artifact = artifact or merge(load_recipe(recipe), QUIET)
    directory = recipe.parent / "engines"
    directory.mkdir()
    path = recipe.parent / "merged.safetensors"
    write_artifact(path, artifact)
    write_bundle(artifact, path, directory, QUIET)
    return directory


def files_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def parts(inspection: Inspection) -> dict[str, tuple[int, int]]:
    return {part.part: (part.parameters, part.bytes) for part in inspection.size.parts}


def test_identical_subspaces_overlap_by_one_and_orthogonal_ones_by_zero() -> None:
    rows = orthonormal_rows(6, 16)
    turned = orthonormal_rows(3, 3, seed=1) @ rows[:3]  # another basis of the same space
    geometry = stack_geometry([rows[:3], turned, rows[3:]])
    np.testing.assert_allclose(geometry.overlap, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-12)
    assert geometry.condition.below_cutoff == 3
    assert geometry.condition.condition is None
    assert stack_geometry([rows[:3], rows[3:]]).condition.condition == pytest.approx(1)


def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles() -> None:
    angles = np.array([0.3, 1.1])
    first = np.eye(2, 8)
    second = np.zeros((2, 8))
    second[[0, 1], [0, 1]], second[[0, 1], [2, 3]] = np.cos(angles), np.sin(angles)
    geometry = stack_geometry([first, second])
    assert geometry.overlap[0, 1] == pytest.approx((np.cos(angles) ** 2).mean())
    sigma = np.linalg.svd(np.concatenate([first, second]), compute_uv=False)
    assert geometry.condition.condition == pytest.approx(sigma[0] / sigma[-1])


def test_random_subspaces_overlap_by_chance() -> None:
    pairs = [
        stack_geometry([orthonormal_rows(4, 20, s), orthonormal_rows(6, 20, s + 500)]) for s in range(200)
    ]
    assert np.mean([pair.overlap[0, 1] for pair in pairs]) == pytest.approx(pairs[0].chance[0, 1], rel=0.05)


def test_zero_rows_and_tasks_without_directions_are_left_out() -> None:
    rows = orthonormal_rows(3, 8)
    padded = np.concatenate([rows, np.zeros((2, 8))])
    geometry = stack_geometry([rows, padded, np.zeros((5, 8))])
    assert geometry.overlap[0, 1] == pytest.approx(1)
    assert np.isnan(geometry.overlap[2]).all()
    assert geometry.condition.directions == 6
    empty = stack_geometry([np.zeros((2, 8)), np.zeros((0, 8))]).condition
    assert (empty.directions, empty.condition, empty.below_cutoff) == (0, None, 0)


def test_more_directions_than_the_space_has_cannot_all_be_kept() -> None:
    condition = stack_geometry([orthonormal_rows(5, 8, seed) for seed in range(3)]).condition
    assert (condition.directions, condition.width, condition.below_cutoff) == (15, 8, 7)
    assert condition.condition is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_and_bytes_of_an_artifact_are_those_of_its_file(
    dtype: torch.dtype, pico_files: Callable[..., Path]
) -> None:
    recipe = load_recipe(pico_files(TASKS, rank=5, router={"rank": 2}))
    path = recipe.path.parent / "merged.safetensors"
    write_artifact(path, merge(recipe, QUIET, dtype))
    shapes = recipe.vision.parameter_shapes()
    tower = sum(math.prod(shape) for shape in shapes.values())
    factors = sum(5 * (sum(shapes[name]) + 1) for name in recipe.vision.matrix_names())
    vectors = sum(math.prod(shape) for shape in shapes.values() if len(shape) != 2)
    expected = {
        "base": tower,
        "merged": tower,
        "bases": TASKS * factors,
        "vectors": TASKS * vectors,
        "router": TASKS * 2 * recipe.vision.width,
        "heads": sum(count * recipe.vision.embed_dim for count in CLASSES) + 3 + 5,  # biases of two tasks
        "engines": 0,
        "container": 0,
    }
    inspection = inspect(path, QUIET)
    found = parts(inspection)
    assert {name: parameters for name, (parameters, _) in found.items()} == expected
    merged_bytes = expected["merged"] * dtype.itemsize
    assert found["merged"][1] == merged_bytes
    assert inspection.size.total.bytes == files_bytes(path)
    assert 0 < found["container"][1] < 100_000
    base_bytes = found["base"][1] / tower
    separate = inspection.size.separate_models
    assert separate.parameters == TASKS * tower + expected["heads"]
    assert separate.bytes == TASKS * tower * base_bytes + found["heads"][1]
    assert inspection.size.one_model.parameters == tower + expected["heads"]
    ratios = inspection.size.ratios
    assert ratios.parameters_to_one_model == sum(expected.values()) / (tower + expected["heads"])
    assert ratios.bytes_to_separate_models == files_bytes(path) / separate.bytes


def test_tasks_have_their_classes_and_ranks(pico_files: Callable[..., Path]) -> None:
    inspection = inspect(write_merged(pico_files(TASKS)), QUIET)
    assert [task.name for task in inspection.tasks] == ["task0", "task1", "task2"]
    assert [task.classes for task in inspection.tasks] == CLASSES
    # A third of min(D_out, D_in): 5 tokens, embedding 16, width 32.
    assert {(task.rank_min, task.rank_max, task.unused_triplets) for task in inspection.tasks} == {(1, 10, 0)}
    assert {task.router_rank for task in inspection.tasks} == {10}


@pytest.mark.parametrize(
    "keys", [{}, {"router": {"norm": "l1", "rank": 2}}, {"base_merge": "zeroshot"}], ids=str
)
def test_artifact_and_bundle_of_the_same_merge_agree(
    keys: dict[str, object], pico_files: Callable[..., Path]
) -> None:
    recipe = pico_files(TASKS, **keys)
    bundle = inspect(export(recipe), QUIET)
    artifact = inspect(recipe.parent / "merged.safetensors", QUIET)
    assert (artifact.kind, bundle.kind) == ("artifact", "bundle")
    for name in ("producer", "tasks", "model", "merge", "conditioning"):
        assert getattr(bundle, name) == getattr(artifact, name), name
    shared = artifact.router.keys() & bundle.router.keys()
    assert {"mode", "threshold", "layers", "taps", "site", "norm"} <= shared
    assert {k: bundle.router[k] for k in shared} == {k: artifact.router[k] for k in shared}
    for name in ("vh", "u", "router"):
        ours, theirs = getattr(bundle.overlap, name), getattr(artifact.overlap, name)
        np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-12)
        assert ours.chance == pytest.approx(theirs.chance)
    assert [pair.tasks for pair in bundle.overlap.pairs] == [pair.tasks for pair in artifact.overlap.pairs]
    of_bundle, of_artifact = parts(bundle), parts(artifact)
    merged = not keys.get("base_merge")
    if merged:  # the base's vectors are in the table of each task's own
        assert of_artifact["base"][0] - of_bundle["base"][0] == of_artifact["vectors"][0] // TASKS
    else:  # the class embedding is added to the positions
        assert of_artifact["base"][0] - of_bundle["base"][0] == 32
    assert of_bundle["bases"] == of_artifact["bases"]
    rows = TASKS if merged else TASKS + 1  # the base's own are there once more, as inputs
    assert of_bundle["vectors"][0] * TASKS == of_artifact["vectors"][0] * rows
    assert (
        of_bundle["heads"][0] == of_artifact["heads"][0] + 4
    )  # the bias that task1 lacks is stored as zeros
    assert (of_bundle["merged"][0] > 0, of_artifact["merged"][0] > 0) == (merged, merged)
    assert bundle.provenance["base"] == artifact.provenance["base"]


def test_a_router_that_reads_no_residuals_has_no_bases_in_the_bundle(pico_files: Callable[..., Path]) -> None:
    recipe = pico_files(TASKS)
    rng = np.random.default_rng(0)
    images = {f"task{i}": rng.normal(i, 1, (12, 3, 16, 16)).astype(np.float32) for i in range(TASKS)}
    calibrated, _ = calibrate_task_images(merge(load_recipe(recipe), QUIET), images, progress=QUIET)
    assert calibrated.info.calibration is not None
    info = dataclasses.replace(calibrated.info.calibration, residual_weight=0.0)
    calibrated = dataclasses.replace(calibrated, info=dataclasses.replace(calibrated.info, calibration=info))
    bundle = inspect(export(recipe, calibrated), QUIET)
    artifact = inspect(recipe.parent / "merged.safetensors", QUIET)
    assert (bundle.router["taps"], bundle.tasks[0].router_rank) == ([], 0)
    assert bundle.overlap.router.mean == ((None,) * TASKS,) * TASKS
    assert artifact.router["calibration"]["level"] == "task_images"
    assert parts(artifact)["router"][0] > parts(bundle)["router"][0] > 0
    for inspection in (bundle, artifact):
        print_inspection(inspection, Console(quiet=True))
        assert json.loads(json_from_inspection(inspection))["kind"] == inspection.kind


def test_bytes_of_a_bundle_are_those_of_its_directory(pico_files: Callable[..., Path]) -> None:
    directory = export(pico_files(TASKS))
    inspection = inspect(directory, QUIET)
    assert inspection.size.total.bytes == files_bytes(directory)
    graphs = sum(file.stat().st_size for file in directory.iterdir() if file.name != "weights.bin")
    padding = parts(inspection)["container"][1] - graphs
    assert 0 <= padding < 64 * 200  # alignment, and the constants of LayerNorm


def test_the_same_checkpoint_twice_and_a_task_equal_to_the_base_are_reported(
    pico_files: Callable[..., Path],
) -> None:
    recipe = pico_files(TASKS, rank=3)
    folder = recipe.parent
    (folder / "task1.safetensors").write_bytes((folder / "task0.safetensors").read_bytes())
    (folder / "task2.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the merge says so too
        inspection = inspect(write_merged(recipe), QUIET)
    first = inspection.overlap.pairs[0]
    assert first.tasks == ("task0", "task1")
    assert (first.vh, first.u, first.router) == pytest.approx((1, 1, 1))
    assert inspection.overlap.vh.mean[0][2] is None
    base = inspection.tasks[2]
    assert base.unused_triplets == 3 * len(inspection.conditioning)
    assert all(m.vh.below_cutoff == 3 and m.u.condition is None for m in inspection.conditioning)
    assert json.loads(json_from_inspection(inspection))["overlap"]["vh"]["mean"][0][2] is None
    print_inspection(inspection, Console(quiet=True))


def test_json_holds_every_field_and_is_all_that_is_printed(pico_files: Callable[..., Path]) -> None:
    path = write_merged(pico_files(TASKS))
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["format"], data["schema_version"]) == ("mass-inspection", 1)
    assert set(data) == {field.name for field in dataclasses.fields(Inspection)}
    assert set(data["overlap"]) == {"vh", "u", "router", "pairs"}
    assert set(data["conditioning"][0]["vh"]) == {"directions", "width", "condition", "below_cutoff"}
    assert len(data["overlap"]["pairs"]) == TASKS * (TASKS - 1) // 2


def test_tables_fit_eighty_columns_and_name_tasks_and_worst_matrices(pico_files: Callable[..., Path]) -> None:
    directory = export(pico_files(12))
    result = CliRunner().invoke(main, ["inspect", str(directory)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    for text in (
        "task11",
        "separate models",
        "Overlap of router's bases",
        "Most overlapping pairs",
        "resblocks.",
    ):
        assert text in result.stdout


def test_a_single_task_is_inspected(pico_files: Callable[..., Path]) -> None:
    inspection = inspect(write_merged(pico_files(1)), QUIET)
    assert inspection.overlap.pairs == ()
    assert inspection.overlap.vh.chance is None
    print_inspection(inspection, Console(quiet=True))


def test_neither_an_artifact_nor_a_bundle_is_one_line_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent: no such file or directory"):
        inspect(tmp_path / "absent", QUIET)
    with pytest.raises(BundleError, match=r"not a bundle"):
        inspect(tmp_path, QUIET)
    file = tmp_path / "notes.txt"
    file.write_text("neither")
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {file}: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_graph_is_an_error_of_the_bundle(pico_files: Callable[..., Path]) -> None:
    directory = export(pico_files(2))
    graph = directory / "first_pass.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(BundleError, match=r"first_pass\.onnx: not an ONNX graph"):
        inspect(directory, QUIET)


def test_a_bundle_is_inspected_without_torch(pico_files: Callable[..., Path]) -> None:
    directory = export(pico_files(2))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from mass_export.inspection import inspect\n"
        "from mass_export.progress import Progress\n"
        f"print(len(inspect(Path({str(directory)!r}), Progress(quiet=True)).tasks))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr
