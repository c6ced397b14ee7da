"""Tasks added to an artifact and removed from it."""

import warnings

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from mass_export import cli
from mass_export.artifact import read_artifact, write_artifact
from mass_export.artifact_changes import ChangedArtifactWarning
from mass_export.calibration_files import calibrate_from_files
from mass_export.errors import MassExportError, RecipeError
from mass_export.merge_to_file import MergeOptions, change_file, merge_to_file
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress

QUIET = Progress(quiet=True)
OPTIONS = MergeOptions(None, QUIET)


@pytest.fixture
def parts(pico_files):
    """`parts(**keys)`: artifact of tasks 0 to 2 of four, a fragment with task 3, and the recipe of all four."""

    def make(factor_dtype=None, **keys):
        keys = keys or {"rank": 1}
        whole = pico_files(tasks=4, **keys)
        data = yaml.safe_load(whole.read_text())
        first = whole.with_name("first.yaml")
        first.write_text(yaml.safe_dump(data | {"tasks": data["tasks"][:3]}))
        fragment = whole.with_name("fragment.yaml")
        fragment.write_text(yaml.safe_dump({"tasks": data["tasks"][3:]}))
        artifact = whole.with_name("merged.safetensors")
        merge_to_file(first, artifact, MergeOptions(factor_dtype, QUIET))
        return artifact, fragment, whole

    return make


def edit(path, **keys):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))


def changed(artifact, add=(), remove=(), options=OPTIONS):
    out = artifact.with_name("changed.safetensors")
    change_file(artifact, out, add, remove, options)
    return out


def task_tensors(path, task):
    stems = tuple(f"{kind}.{task}." for kind in ("tasks", "router", "heads"))
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith(stems)}


def test_an_added_task_gives_what_merging_all_at_once_gives(parts):
    artifact, fragment, whole = parts()
    added = load_file(changed(artifact, [fragment]))
    at_once = whole.with_name("at_once.safetensors")
    merge_to_file(whole, at_once, OPTIONS)
    expected = load_file(at_once)
    assert added.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(added[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_factors_of_other_tasks_stay_byte_for_byte(parts, dtype):
    artifact, fragment, _ = parts(factor_dtype=dtype)
    out = changed(artifact, [fragment], ["task1"])
    assert [task.name for task in read_artifact(out).info.tasks] == ["task0", "task2", "task3"]
    assert read_artifact(out).storage.factor_dtype == dtype
    for task in ("task0", "task2"):
        before, after = task_tensors(artifact, task), task_tensors(out, task)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not task_tensors(out, "task1")


def test_removing_what_was_added_restores_the_first_pass(parts):
    artifact, fragment, _ = parts()
    back = changed(changed(artifact, [fragment]), remove=["task3"], options=OPTIONS)
    before, after = load_file(artifact), load_file(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_ranks_are_fixed_and_a_crowd_is_warned_of(parts):
    artifact, fragment, _ = parts(base_merge="zeroshot")
    with pytest.warns(ChangedArtifactWarning, match=r"add up to 1\.\d+ of a matrix' full rank.*for 1/4"):
        out = changed(artifact, [fragment])
    loaded = read_artifact(out)
    assert loaded.info.rank_ratios == (1 / 3,) * 4
    ranks = [{name: m.rank for name, m in task.matrices.items()} for task in loaded.tasks]
    assert ranks[3] == ranks[0]


@pytest.mark.parametrize("where", ["fragment", "task"])
def test_a_fragment_may_give_its_own_rank(parts, where):
    artifact, fragment, _ = parts()
    if where == "fragment":
        edit(fragment, rank=2)
    else:
        task = yaml.safe_load(fragment.read_text())["tasks"][0]
        edit(fragment, tasks=[task | {"rank_ratio": 0.0625}])
    loaded = read_artifact(changed(artifact, [fragment]))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert [task.matrices[name].rank for task in loaded.tasks] == [1, 1, 1, 2]


def test_the_record_tells_what_was_changed(parts):
    artifact, fragment, _ = parts()
    provenance = read_artifact(changed(artifact, [fragment], ["task0"])).info.provenance
    assert list(provenance["tasks"]) == ["task1", "task2", "task3"]
    assert provenance["changes"][0] == {"removed": "task0"}
    assert provenance["changes"][1]["added"] == ["task3"]
    assert provenance["changes"][1]["fragment"]["file"] == "fragment.yaml"


def test_a_changed_artifact_is_exported_with_equal_results(parts, tmp_path):
    artifact, fragment, _ = parts()
    out = changed(artifact, [fragment], ["task1"])
    export_bundle(read_artifact(out), out, tmp_path / "bundle", verify=True, progress=QUIET)


def test_a_calibration_is_left_out_and_said_so(parts):
    artifact, fragment, _ = parts()
    calibrated, _ = calibrate_from_files(
        read_artifact(artifact), pool=None, task_images=(), synthetic=True, limit=8, progress=QUIET
    )
    write_artifact(artifact, calibrated)
    with pytest.warns(ChangedArtifactWarning, match="calibration was for the old tasks.*mass calibrate"):
        out = changed(artifact, [fragment])
    assert read_artifact(out).calibration is None


def test_a_merged_file_as_first_pass_stays_with_a_warning(parts):
    artifact, fragment, _ = parts(base_merge={"file": "task0.safetensors"}, rank=1)
    with pytest.warns(ChangedArtifactWarning, match="first pass stays the merged checkpoint"):
        out = changed(artifact, [fragment])
    before, after = read_artifact(artifact), read_artifact(out)
    assert all(torch.equal(after.merged[name], tensor) for name, tensor in before.merged.items())


@pytest.mark.parametrize("method", ["mean", "isotropic"])
def test_merges_of_full_deltas_cannot_be_changed(parts, method):
    artifact, fragment, _ = parts(base_merge=method, rank=1)
    with pytest.raises(RecipeError, match=rf"base_merge: {method}\) is merged from the full deltas"):
        changed(artifact, [fragment])


@pytest.mark.parametrize(
    ("remove", "keys", "pattern"),
    [
        (["cars"], {}, r"no task cars; it holds task0, task1, task2"),
        (["task0", "task1", "task2"], {}, "leaves no task"),
        ([], {"tasks": []}, "expected a list of tasks"),
        ([], {"router": {}}, r"fragment: unknown key\(s\) router"),
        ([], {"base": "task0.safetensors"}, "is not the base of"),
        ([], {"base": "none.safetensors"}, "no such file"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(parts, remove, keys, pattern):
    artifact, fragment, _ = parts()
    edit(fragment, **keys)
    with pytest.raises(MassExportError, match=pattern):
        changed(artifact, [fragment], remove)
    assert not artifact.with_name("changed.safetensors").exists()


def test_a_name_that_is_taken_is_refused_unless_that_task_is_removed(parts):
    artifact, fragment, _ = parts()
    task = yaml.safe_load(fragment.read_text())["tasks"][0]
    edit(fragment, tasks=[task | {"name": "task1"}], base="base.safetensors")
    with pytest.raises(RecipeError, match="task1 are taken"):
        changed(artifact, [fragment])
    assert [t.name for t in read_artifact(changed(artifact, [fragment], ["task1"])).info.tasks][-1] == "task1"


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_the_command_line_changes_an_artifact_in_place(parts):
    artifact, fragment, _ = parts()
    result = run(
        "merge", artifact, "--add", fragment, "--remove", "task0", "--out", artifact, "--factor-dtype", "int8"
    )
    assert result.exit_code == 0, result.output
    assert "3 tasks" in result.output
    loaded = read_artifact(artifact)
    assert [task.name for task in loaded.info.tasks] == ["task1", "task2", "task3"]
    assert loaded.storage.factor_dtype == "int8"


def test_the_command_line_reads_pickled_modules_only_when_told_to(pico_files, pico_tower):
    recipe = pico_files(tasks=2)
    module = torch.nn.Module()
    for name, tensor in pico_tower(1).items():
        inner = module
        *path, last = f"visual.{name}".split(".")
        for part in path:
            if part not in dict(inner.named_children()):
                inner.add_module(part, torch.nn.Module())
            inner = inner.get_submodule(part)
        inner.register_parameter(last, torch.nn.Parameter(tensor))
    torch.save(module, recipe.with_name("task0.safetensors"))
    out = recipe.with_name("merged.safetensors")
    refused = run("merge", recipe, "--out", out)
    assert refused.exit_code == 1
    assert "--allow-pickle" in refused.output
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        taken = run("merge", recipe, "--out", out, "--allow-pickle")
    assert taken.exit_code == 0, taken.output
    assert "no code of them ran" in taken.stderr
