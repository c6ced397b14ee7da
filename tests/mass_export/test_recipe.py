from __future__ import annotations

import re

import pytest
import yaml

from mass_export.errors import ModelConfigError, RecipeError
from mass_export.recipe import load_recipe
from mass_export.router_spec import RouterSettings, default_router
from mass_export.spec import MergeSettings


def edit(path, change):
    recipe = yaml.safe_load(path.read_text())
    change(recipe)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def fails(path, pattern, error=RecipeError):
    with pytest.raises(error, match=pattern) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_minimal_recipe_takes_the_defaults(pico_files, pico_vision, pico_model_config):
    path = pico_files(tasks=4, router=None)
    recipe = load_recipe(path)
    assert recipe.vision == pico_vision
    assert recipe.model_config == pico_model_config
    assert recipe.merge == MergeSettings(base_merge="zeroshot")
    assert recipe.router == default_router(3, 4)
    assert (recipe.rank_ratio, recipe.rank, recipe.base_merge_file) == (0.25, None, None)
    assert [task.name for task in recipe.tasks] == ["task0", "task1", "task2", "task3"]
    assert recipe.tasks[0].head.bias == "task0.bias"
    assert recipe.tasks[1].head.bias is None
    assert recipe.tasks[1].classes == tuple(f"task1-class{i}" for i in range(4))
    assert recipe.tasks[1].rank_ratio == 0.25
    assert recipe.inputs()[:2] == (path, path.parent / "base.safetensors")


def test_routers_have_names(pico_files):
    paper, default = (load_recipe(pico_files(tasks=4, router=name)) for name in ("paper", "default"))
    assert paper.router == RouterSettings(layer=2)
    assert paper.merge == MergeSettings(base_merge="tsvm")
    assert default.router == default_router(3, 4)
    assert default.merge == MergeSettings(base_merge="zeroshot")
    merged = load_recipe(pico_files(router="default", base_merge="tsvm"))
    assert merged.merge == MergeSettings(base_merge="tsvm")
    every = load_recipe(pico_files(router={"layers": "all", "rank": 2}))
    assert every.router == RouterSettings(layers=(0, 1, 2), rank=2)


def test_every_key_is_read(pico_files):
    path = pico_files(
        rank=6,
        base_merge={"file": "base.safetensors"},
        compose="sum",
        sum_weights="gates",
        vectors="base",
        head_choice="mean",
        router={
            "layer": 1,
            "site": "attn",
            "token": "mean",
            "norm": "l1",
            "mode": "weighted",
            "threshold": 0.1,
            "temperature": 2,
            "max_tasks": 2,
            "rank": 3,
        },
    )
    recipe = load_recipe(path)
    assert recipe.merge == MergeSettings("file", "sum", "gates", "base", "mean")
    assert recipe.base_merge_file == path.parent / "base.safetensors"
    assert recipe.router == RouterSettings(1, "attn", "mean", "l1", "weighted", 0.1, 2, 2, 3)
    assert (recipe.rank_ratio, recipe.rank) == (None, 6)
    assert path.parent / "base.safetensors" in recipe.inputs()


def test_a_tasks_own_rank_overrides_the_recipes(pico_files):
    def change(recipe):
        recipe["tasks"][0]["rank_ratio"] = 1
        recipe["tasks"][1]["rank"] = 2

    tasks = load_recipe(edit(pico_files(rank_ratio=0.5), change)).tasks
    assert [(task.rank_ratio, task.rank) for task in tasks] == [(1.0, None), (None, 2), (0.5, None)]


def test_classes_may_lie_in_a_text_file(pico_files):
    path = pico_files()
    (path.parent / "classes.txt").write_bytes("\ufeffcat\r\nred panda \nΔ\n\n".encode())
    edit(path, lambda recipe: recipe["tasks"][0].update(classes="classes.txt"))
    assert load_recipe(path).tasks[0].classes == ("cat", "red panda", "Δ")


def test_a_gap_in_a_class_file_is_named_by_line(pico_files):
    path = pico_files()
    (path.parent / "classes.txt").write_text("cat\n\ndog\n")
    edit(path, lambda recipe: recipe["tasks"][0].update(classes="classes.txt"))
    fails(path, r"tasks\[0\] \(task0\)\.classes: .*classes\.txt: line\(s\) \[2\] are empty")
    (path.parent / "classes.txt").write_bytes(b"\xff\xfe\x00")
    fails(path, r"tasks\[0\] \(task0\)\.classes: .*UTF-8")


@pytest.mark.parametrize("key", ["model", "base", "tasks"])
def test_missing_keys_are_named(pico_files, key):
    fails(
        edit(pico_files(), lambda recipe: recipe.pop(key)), rf"recipe\.yaml: recipe: missing key\(s\) {key}"
    )


@pytest.mark.parametrize("key", ["name", "checkpoint", "head", "classes"])
def test_missing_task_keys_are_named(pico_files, key):
    path = edit(pico_files(), lambda recipe: recipe["tasks"][1].pop(key))
    fails(path, rf"tasks\[1\].*missing key\(s\) {key}")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda r: r.update(colour=1), r"recipe: unknown key\(s\) colour; known are model, base"),
        (lambda r: r["tasks"][1].update(checkpiont=1), r"tasks\[1\] \(task1\): unknown key\(s\) checkpiont"),
        (
            lambda r: r["tasks"][0]["head"].update(baes=1),
            r"tasks\[0\] \(task0\)\.head: unknown key\(s\) baes",
        ),
        (lambda r: r.update(router={"layr": 1}), r"recipe\.yaml: router: unknown key\(s\) layr"),
        (
            lambda r: r.update(router=[1]),
            r"router: expected default, paper or a mapping of settings, got \[1\]",
        ),
        (lambda r: r.update(router={"layer": 3}), r"router\.layer: expected 0 to 2 for this model, got 3"),
        (lambda r: r.update(router={"norm": "l0"}), r"recipe\.yaml: router\.norm: expected one of l2"),
        (lambda r: r.update(base_merge="ties"), r"base_merge: expected one of tsvm"),
        (lambda r: r.update(base_merge="file"), r"base_merge: write \{file:"),
        (lambda r: r.update(base_merge={"path": "x"}), r"base_merge: unknown key\(s\) path"),
        (lambda r: r.update(base_merge={"file": "x"}), r"base_merge\.file: no such file: .*x"),
        (lambda r: r.update(compose=["sum"]), r"compose: expected one of tsvm, sum, got \['sum'\]"),
        (lambda r: r.update(rank=2, rank_ratio=0.5), r"rank_ratio and rank: give one of them"),
        (lambda r: r.update(rank=0), r"rank: expected an integer >= 1, got 0"),
        (lambda r: r.update(rank_ratio=1.5), r"rank_ratio: expected a number in \(0, 1\].*got 1\.5"),
        (lambda r: r.update(rank_ratio="1e-1"), r"rank_ratio: expected a number"),
        (lambda r: r["tasks"][2].update(rank=True), r"tasks\[2\] \(task2\)\.rank: expected an integer"),
        (lambda r: r.update(base="none.pt"), r"base: no such file: .*none\.pt \(paths are relative"),
        (
            lambda r: r["tasks"][2].update(checkpoint="x.pt"),
            r"tasks\[2\] \(task2\)\.checkpoint: no such file",
        ),
        (lambda r: r["tasks"][2]["head"].update(file="x"), r"\(task2\)\.head\.file: no such file"),
        (lambda r: r["tasks"][2]["head"].update(tensor=5), r"\(task2\)\.head\.tensor: expected text, got 5"),
        (lambda r: r["tasks"][2].update(head="x"), r"\(task2\)\.head: expected a mapping"),
        (lambda r: r["tasks"][2].update(classes="x.txt"), r"\(task2\)\.classes: no such file"),
        (lambda r: r["tasks"][2].update(classes=[]), r"task task2: its class list is empty"),
        (lambda r: r["tasks"][2].update(classes=["a", "a"]), r"class names repeat: 'a'"),
        (lambda r: r["tasks"][2].update(classes=["a", 1]), r"\(task2\)\.classes\[1\]: .*got 1; quote it"),
        (
            lambda r: r["tasks"][2].update(classes=[False, "a"]),
            r"\(task2\)\.classes\[0\]: .*got False; quote it",
        ),
        (lambda r: r["tasks"][2].update(name="a b"), r"tasks\[2\] \(a b\): task name 'a b'"),
        (lambda r: r["tasks"][2].update(name=True), r"tasks\[2\]: name: expected text, got True; quote it"),
        (lambda r: r["tasks"][2].update(name="task0"), r"tasks: the name\(s\) task0 are given twice"),
        (lambda r: r.update(tasks=[]), r"tasks: expected a list of tasks, got \[\]"),
        (lambda r: r.update(tasks={"a": 1}), r"tasks: expected a list of tasks"),
        (lambda r: r.update(tasks=["cars"]), r"tasks\[0\]: expected a mapping"),
        (lambda r: r.update(model=3), r"model: expected text, got 3"),
    ],
)
def test_an_invalid_recipe_names_file_and_key(pico_files, change, pattern):
    message = fails(edit(pico_files(), change), pattern)
    assert "recipe.yaml: " in message


def test_an_unknown_model_is_an_error_of_the_model_config(pico_files):
    path = edit(pico_files(), lambda recipe: recipe.update(model="missing.json"))
    fails(path, r"missing\.json: no such file", ModelConfigError)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("base: a\nbase: b\n", r"line 2, column 1: the key 'base' is given twice"),
        ("tasks:\n- {name: a, name: b}\n", r"line 2, column 13: the key 'name' is given twice"),
        ("a: [", r"not a valid recipe at line 1"),
        ("{[1]: 2}", r"keys must be plain text"),
        ("!!python/object/apply:os.getcwd []", r"could not determine a constructor"),
        ("a: 1\n---\nb: 2", r"expected a single document"),
        ("", r"recipe: expected a mapping"),
        ("just text", r"recipe: expected a mapping"),
        ("\0", r"not YAML text"),
        ("[" * 1000, r"not YAML text|not a valid recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, pattern):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    fails(path, pattern)


def test_unreadable_recipes_are_refused(tmp_path):
    fails(tmp_path / "none.yaml", r"none\.yaml: no such file")
    fails(tmp_path, r"cannot be read")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    fails(tmp_path / "binary", r"not YAML text")


def test_the_documented_recipe_uses_known_keys():
    import mass_export.recipe as module

    text = "\n".join(line for line in module.__doc__.splitlines() if line.startswith("    "))
    recipe = yaml.safe_load(text)
    assert set(recipe) <= set(module._TOP_KEYS)
    assert set(module.MERGE_KEYS) <= set(recipe)
    assert set(recipe["tasks"][0]) <= set(module._TASK_KEYS)
    assert re.search("Only model, base and tasks are required", module.__doc__)
