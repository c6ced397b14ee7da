"""`mass calibrate` on folders and array files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mass_export.artifact import read_artifact, write_artifact
from mass_export.cli import main
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.recipe import load_recipe


@pytest.fixture
def artifact_path(pico_files: Callable[..., Path], tmp_path: Path) -> Path:
    router = {"layers": [0, 1], "standardize": "tasks", "mode": "top1"}
    path = tmp_path / "merged.safetensors"
    write_artifact(path, merge(load_recipe(pico_files(tasks=3, router=router)), Progress(quiet=True)))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    places = {}
    for index in range(3):
        place = tmp_path / f"images{index}" / "nested"
        place.mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(80 * index, 80 * index + 80, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
        places[f"task{index}"] = place.parent
    return places


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["calibrate", *map(str, arguments)])
    return f"{result.exit_code} {result.output}"


@pytest.mark.usefixtures("folders")
def test_a_pool_folder_calibrates_the_residuals(artifact_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "router calibrated on 18 images" in run(artifact_path, "--pool", tmp_path, "--out", out)
    info = read_artifact(out).info.calibration
    assert info is not None
    assert (info.level, info.images) == ("pool", {"pool": 18})


def test_task_images_fit_a_discriminant_and_may_follow_as_further_pairs(
    artifact_path: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    pairs = [f"{name}={folder}" for name, folder in folders.items()]
    assert "from 18 images" in run(artifact_path, "--out", out, "--task-images", *pairs)
    info = read_artifact(out).info.calibration
    assert info is not None
    assert info.images == {"task0": 6, "task1": 6, "task2": 6}
    assert info.discriminant


def test_synthetic_images_and_array_files_work_and_the_artifact_may_be_replaced(
    artifact_path: Path, tmp_path: Path
) -> None:
    assert "synthetic" in run(artifact_path, "--synthetic", "--out", artifact_path)
    np.savez(
        tmp_path / "pool.npz", images=np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
    )
    assert "on 4 images" in run(
        artifact_path, "--pool", tmp_path / "pool.npz", "--limit", 4, "--out", artifact_path
    )
    assert read_artifact(artifact_path).info.calibration.level == "pool"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of"),
        (["--synthetic", "--pool", "x"], "exactly one of"),
        (["--pool", "missing"], "missing: no such file or folder"),
        (["--task-images", "task0"], "expected TASK=FOLDER"),
    ],
)
def test_wrong_arguments_are_one_clear_error_and_write_nothing(
    arguments: list[str], message: str, artifact_path: Path, tmp_path: Path
) -> None:
    output = run(artifact_path, "--out", tmp_path / "out.safetensors", *arguments)
    assert output.startswith("1 Error:")
    assert message in output
    assert not (tmp_path / "out.safetensors").exists()
