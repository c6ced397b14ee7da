"""`mass doctor` finds each signature in a case that was made for it, and nothing in sound ones."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from mass_export.artifact import Artifact, write_artifact
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.cli import main
from mass_export.diagnosis import diagnose, json_from_diagnosis
from mass_export.diagnosis_report import Diagnosis, print_diagnosis
from mass_export.errors import ArtifactError, DataError
from mass_export.heads import Head
from mass_export.image_pool import load_pool
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle, write_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime.errors import BundleError

QUIET = Progress(quiet=True)
WIDTH = 32


@pytest.fixture(params=["artifact", "bundle"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Artifact], Path]:
    """`saved(artifact)`: as an artifact's file, or as a bundle."""

    def save(artifact: Artifact) -> Path:
        path = tmp_path / "merged.safetensors"
        write_artifact(path, artifact)
        if request.param == "artifact":
            return path
        bundle = tmp_path / "engines"
        bundle.mkdir()
        write_bundle(artifact, path, bundle, QUIET)
        return bundle

    return save


def merged(recipe: Path) -> Artifact:
    return merge(load_recipe(recipe), QUIET)


def change_checkpoint(recipe: Path, task: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Replace each tensor of a task's checkpoint by `change(name, tensor)`."""
    file = recipe.parent / f"{task}.safetensors"
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file)


def found(diagnosis: Diagnosis) -> dict[str, tuple[str, set[str]]]:
    """Severity and subjects by check, the worst of each."""
    return {f.check: (f.severity, set(f.subjects)) for f in reversed(diagnosis.findings)}


def with_router(artifact: Artifact, **settings: object) -> Artifact:
    router = dataclasses.replace(artifact.info.router, **settings)
    return dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))


def with_router_bases(artifact: Artifact, bases: list[torch.Tensor]) -> Artifact:
    rows = tuple(dict.fromkeys(old, new) for old, new in zip(artifact.router_bases, bases, strict=True))
    return dataclasses.replace(artifact, router_bases=rows)


def with_head_scaled(artifact: Artifact, task: int, factor: float) -> Artifact:
    heads = list(artifact.heads)
    heads[task] = Head(heads[task].weight * factor, heads[task].bias)
    return dataclasses.replace(artifact, heads=tuple(heads))


def test_sound_weights_give_no_finding(pico_files, saved) -> None:
    diagnosis = diagnose(saved(merged(pico_files(4, router="default"))), QUIET)
    assert diagnosis.findings == ()
    assert {check.outcome for check in diagnosis.checks} == {"ok"}
    assert len(diagnosis.checks) >= 8


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_sound_bundles_of_fewer_bits_give_no_finding(pico_files, tmp_path, precision) -> None:
    artifact, path = merged(pico_files(3, router="default")), tmp_path / "merged.safetensors"
    write_artifact(path, artifact)
    out = tmp_path / precision
    bundle = export_bundle(artifact, path, out, verify=False, progress=QUIET, precision=precision)
    assert diagnose(bundle, QUIET).findings == ()


@pytest.mark.filterwarnings("ignore::mass_export.task_factors.UnroutableTaskWarning")
def test_a_task_that_equals_the_base_is_named(pico_files, saved) -> None:
    recipe = pico_files(3, router="default")
    base = load_file(recipe.parent / "base.safetensors")
    change_checkpoint(recipe, "task1", lambda name, _: base[name])
    diagnosis = diagnose(saved(merged(recipe)), QUIET)
    assert found(diagnosis)["zero_vectors"] == ("problem", {"task1"})
    assert diagnosis.worst == "problem"


def test_a_checkpoint_of_another_base_is_named(pico_files, pico_tower, saved) -> None:
    recipe = pico_files(3, router="default", rank_ratio=0.8)
    other = {f"visual.{name}": tensor for name, tensor in pico_tower(99).items()}
    change_checkpoint(recipe, "task2", lambda name, _: other[name])
    assert found(diagnose(saved(merged(recipe)), QUIET))["large_vectors"] == ("warning", {"task2"})


def test_a_task_vector_far_longer_than_the_others_is_named(pico_files, saved) -> None:
    recipe = pico_files(4, router="default")
    base = load_file(recipe.parent / "base.safetensors")
    change_checkpoint(recipe, "task0", lambda name, tensor: base[name] + 6 * (tensor - base[name]))
    assert found(diagnose(saved(merged(recipe)), QUIET))["large_vectors"] == ("warning", {"task0"})


def test_a_rank_that_cuts_off_a_high_spectrum_is_seen(pico_files, saved) -> None:
    findings = found(diagnose(saved(merged(pico_files(3, rank=2, router="default"))), QUIET))
    assert findings["low_rank"][0] == "warning"


@pytest.mark.parametrize(("turned", "severity"), [(False, "problem"), (True, "warning")])
def test_tasks_with_the_same_directions_are_named(pico_files, saved, turned, severity) -> None:
    recipe = pico_files(3, router="default")
    first = load_file(recipe.parent / "task0.safetensors")
    base = load_file(recipe.parent / "base.safetensors")
    generator = torch.Generator().manual_seed(0)

    def like_the_first(name: str, _: torch.Tensor) -> torch.Tensor:
        delta = first[name] - base[name]
        noise = torch.randn(delta.shape, generator=generator) * delta.std() * (0.1 if turned else 0)
        return first[name] + noise

    change_checkpoint(recipe, "task1", like_the_first)
    assert found(diagnose(saved(merged(recipe)), QUIET))["same_tasks"] == (severity, {"task0", "task1"})


def test_stacks_that_do_not_fit_their_space_are_seen_where_they_are_used(pico_files, saved) -> None:
    recipe = pico_files(4, rank_ratio=0.9)
    findings = found(diagnose(saved(merged(recipe)), QUIET))
    assert findings["ill_conditioned"][0] == "warning"
    assert "transformer.resblocks.0.mlp.c_fc.weight" in findings["ill_conditioned"][1]


def test_stacks_that_nothing_uses_are_no_matter(pico_files, saved) -> None:
    recipe = pico_files(4, rank_ratio=0.9, router="default")
    assert "ill_conditioned" not in found(diagnose(saved(merged(recipe)), QUIET))


@pytest.mark.parametrize(("router", "severity"), [("paper", "warning"), ("default", "note")])
def test_a_loud_head_is_named_and_matters_where_heads_compete(pico_files, saved, router, severity) -> None:
    artifact = with_head_scaled(merged(pico_files(3, router=router)), 1, 20.0)
    severity_found, subjects = found(diagnose(saved(artifact), QUIET))["head_scales"]
    assert severity_found == severity
    assert "task1" in subjects


def test_router_bases_of_unlike_rank_are_named(pico_files, saved) -> None:
    artifact = merged(pico_files(3))
    bases = [torch.eye(WIDTH)[:rank] for rank in (12, 3, 3)]
    findings = found(diagnose(saved(with_router_bases(artifact, bases)), QUIET))
    assert findings["router_ranks"] == ("warning", {"task0", "task1"})


def test_a_threshold_that_no_gate_can_pass_is_seen(pico_files, saved) -> None:
    artifact = with_router(merged(pico_files(3)), threshold=0.9)
    assert found(diagnose(saved(artifact), QUIET))["router_settings"][0] == "warning"


def test_gates_of_two_tasks_are_always_the_same(pico_files, saved) -> None:
    assert found(diagnose(saved(merged(pico_files(2))), QUIET))["router_settings"][0] == "note"


def test_a_router_that_always_takes_one_task_is_seen_with_and_without_labels(pico_data, tmp_path) -> None:
    recipe, data = pico_data(3)
    everything = [torch.eye(WIDTH), torch.eye(WIDTH)[:3], torch.eye(WIDTH)[3:6]]  # leaves no residual at all
    path = tmp_path / "merged.safetensors"
    artifact = with_router(with_router_bases(merged(recipe), everything), mode="top1")
    write_artifact(path, artifact)
    labelled = found(diagnose(path, QUIET, data=data))
    assert labelled["collapse"] == ("problem", {"task0"})
    assert labelled["lost_tasks"][0] == "problem"
    pool = found(diagnose(path, QUIET, images=data / "data" / "task1" / "val.npz"))
    assert pool["collapse"] == ("warning", {"task0"})


def distinct_data(directory: Path, tasks: int = 3) -> Path:
    """Images of one grey level a task, which any router with bases made from them tells apart."""
    for index in range(tasks):
        file = directory / "data" / f"task{index}" / "val.npz"
        file.parent.mkdir(parents=True)
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 256, (16, 16, 3))
        images = np.clip(picture + rng.integers(-4, 5, (16, 16, 16, 3)), 0, 255).astype(np.uint8)
        np.savez(file, images=images, labels=np.zeros(16, np.int64))
    return directory


def test_a_task_whose_images_go_to_another_is_named(pico_files, tmp_path) -> None:
    recipe, data = pico_files(3, router={"mode": "top1"}), distinct_data(tmp_path / "images")
    artifact = merged(recipe)
    images = {
        f"task{i}": load_pool(data / "data" / f"task{i}" / "val.npz", artifact.info.preprocess)
        for i in range(3)
    }
    swapped = {"task0": images["task1"], "task1": images["task0"], "task2": images["task2"]}
    for name, given in {"right": images, "swapped": swapped}.items():
        calibrated, _ = calibrate_task_images(artifact, given, progress=QUIET)
        path = tmp_path / f"{name}.safetensors"
        write_artifact(path, with_router(calibrated, verify_margin=0.0))
    assert "lost_tasks" not in found(diagnose(tmp_path / "right.safetensors", QUIET, data=data))
    diagnosis = diagnose(tmp_path / "swapped.safetensors", QUIET, data=data)
    lost = [f for f in diagnosis.findings if f.check == "lost_tasks"]
    assert [(f.severity, f.subjects) for f in lost] == [
        ("problem", ("task0", "task1")),
        ("problem", ("task1", "task0")),
    ]


def test_routes_decided_by_nothing_are_seen(pico_data, tmp_path) -> None:
    recipe, data = pico_data(3)
    path = tmp_path / "merged.safetensors"
    write_artifact(path, with_router_bases(merged(recipe), [torch.eye(WIDTH)[:4]] * 3))
    assert found(diagnose(path, QUIET, data=data))["ties"][0] == "warning"


def test_sets_that_are_always_full_and_a_head_that_always_wins_are_seen(pico_data, tmp_path) -> None:
    recipe, data = pico_data(3)
    artifact = with_router(merged(recipe), temperature=1000.0, threshold=0.1)
    path = tmp_path / "merged.safetensors"
    write_artifact(path, with_head_scaled(artifact, 2, 1000.0))
    findings = found(diagnose(path, QUIET, data=data))
    assert findings["set_sizes"][0] == "warning"
    assert findings["loud_heads"] == ("warning", {"task2"})
    write_artifact(path, with_router(merged(recipe), threshold=0.3))
    findings = found(diagnose(path, QUIET, data=data))
    assert {"set_sizes", "loud_heads"}.isdisjoint(findings)


def test_many_unknown_images_are_seen(pico_files, tmp_path) -> None:
    recipe, data = pico_files(3), distinct_data(tmp_path / "images")
    artifact = merged(recipe)
    images = {
        f"task{i}": load_pool(data / "data" / f"task{i}" / "val.npz", artifact.info.preprocess)
        for i in range(3)
    }
    calibrated, _ = calibrate_task_images(artifact, images, progress=QUIET)
    path = tmp_path / "merged.safetensors"
    write_artifact(path, calibrated)
    assert "unknown" not in found(diagnose(path, QUIET, data=data))
    rng = np.random.default_rng(9)
    np.savez(tmp_path / "strange.npz", images=rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))
    assert found(diagnose(path, QUIET, images=tmp_path / "strange.npz"))["unknown"][0] == "warning"


def test_outputs_that_are_not_finite_are_a_problem(pico_data, tmp_path) -> None:
    recipe, data = pico_data(3)
    artifact = merged(recipe)
    signs = torch.randn(artifact.heads[0].weight.shape, generator=torch.Generator().manual_seed(0)).sign()
    heads = (Head(3e38 * signs), *artifact.heads[1:])
    path = tmp_path / "merged.safetensors"
    write_artifact(path, dataclasses.replace(artifact, heads=heads))
    finding = diagnose(path, QUIET, data=data).findings[0]
    assert (finding.check, finding.severity) == ("runs", "problem")
    assert "NaN or infin" in finding.seen


def test_damaged_and_extra_files_of_a_bundle_are_named(pico_bundle) -> None:
    _, _, bundle = pico_bundle()
    (bundle / "notes.txt").write_text("mine")
    assert found(diagnose(bundle, QUIET))["files"] == ("note", {"notes.txt"})
    weights = bundle / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    diagnosis = diagnose(bundle, QUIET)
    assert [finding.check for finding in diagnosis.findings] == ["files"]
    assert "weights.bin was changed" in diagnosis.findings[0].seen


def test_what_is_neither_artifact_nor_bundle_is_refused(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="no such file or directory"):
        diagnose(tmp_path / "gone", QUIET)
    with pytest.raises(BundleError, match="not a bundle"):
        diagnose(tmp_path, QUIET)
    with pytest.raises(DataError, match="not both"):
        diagnose(tmp_path, QUIET, data=tmp_path, images=tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", "-q", *map(str, arguments)])


def test_exit_codes_and_json(pico_files, tmp_path) -> None:
    path = tmp_path / "merged.safetensors"
    sound = merged(pico_files(3, router="default"))
    write_artifact(path, sound)
    assert run(path).exit_code == 0
    assert "Nothing found" in run(path).output
    write_artifact(path, merged(pico_files(3, router="default", rank=2)))
    assert run(path).exit_code == 0
    assert run(path, "--strict").exit_code == 3
    shutil.copyfile(tmp_path / "task0.safetensors", tmp_path / "task1.safetensors")
    write_artifact(path, merged(tmp_path / "recipe.yaml"))
    result = run(path, "--json")
    assert result.exit_code == 3
    data = json.loads(result.output)
    assert data["format"] == "mass-diagnosis"
    assert data["findings"][0]["check"] == "same_tasks"
    assert set(data["findings"][0]) == {"check", "severity", "subjects", "seen", "advice"}
    assert json.loads(json_from_diagnosis(diagnose(path, QUIET))) == data
    missing = run(tmp_path / "gone")
    assert missing.exit_code == 1
    assert missing.output.startswith("Error: ")


def test_the_table_fits_eighty_columns_and_says_what_to_try(pico_files, tmp_path) -> None:
    path = tmp_path / "merged.safetensors"
    write_artifact(path, with_head_scaled(merged(pico_files(3)), 1, 20.0))
    console = Console(width=80, record=True, file=io.StringIO())
    print_diagnosis(diagnose(path, QUIET), console)
    text = console.export_text()
    assert "head_scales" in text
    assert "Scale the head" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_folder_of_pictures_is_enough(pico_files, tmp_path) -> None:
    path = tmp_path / "merged.safetensors"
    write_artifact(path, merged(pico_files(3)))
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 30), (40 * number, 80, 90)).save(folder / f"{number}.png")
    assert diagnose(path, QUIET, images=folder).images == 3
