"""Interrupted merges go on from the factors that they left."""

import pytest
import yaml

from mass_export import merge as merge_module
from mass_export.factor_cache import FactorCache
from mass_export.merge_to_file import MergeOptions, merge_to_file
from mass_export.progress import Progress

OPTIONS = MergeOptions(None, Progress(quiet=True))


@pytest.fixture
def opened(monkeypatch):
    """Names of the tasks whose checkpoints were opened."""
    names = []
    original = merge_module.open_task_vector

    def record(task, *rest):
        names.append(task.name)
        return original(task, *rest)

    monkeypatch.setattr(merge_module, "open_task_vector", record)
    return names


@pytest.fixture
def interrupted(pico_files, monkeypatch):
    """`interrupted(**keys)`: a recipe and where its merge was to go; it was interrupted in the third task."""

    def make(**keys):
        recipe = pico_files(tasks=4, **keys)
        out = recipe.with_name("merged.safetensors")
        original = merge_module.factorize_task

        def interrupt(*arguments):
            if arguments[-1] == "task2":
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(merge_module, "factorize_task", interrupt)
            with pytest.raises(KeyboardInterrupt):
                merge_to_file(recipe, out, OPTIONS)
        assert not out.exists()
        return recipe, out

    return make


def fresh(recipe):
    out = recipe.with_name("fresh.safetensors")
    merge_to_file(recipe, out, OPTIONS)
    return out.read_bytes()


@pytest.mark.parametrize("keys", [{}, {"rank_budget": 0.2}, {"router": {"layer": 0, "rank": 12}}])
def test_an_interrupted_merge_opens_only_what_is_left_and_gives_the_same_bytes(interrupted, opened, keys):
    recipe, out = interrupted(**keys)
    expected = fresh(recipe)
    opened.clear()
    merge_to_file(recipe, out, OPTIONS)
    assert opened == ["task2", "task3"]
    assert out.read_bytes() == expected
    assert not [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


def test_merges_of_full_deltas_resume_with_the_same_bytes(interrupted):
    recipe, out = interrupted(base_merge="mean")
    expected = fresh(recipe)
    merge_to_file(recipe, out, OPTIONS)
    assert out.read_bytes() == expected


@pytest.mark.filterwarnings(
    "ignore::mass_export.merging.IllConditionedWarning"
)  # one checkpoint is there twice
def test_what_has_changed_since_is_factorised_anew(interrupted, opened):
    recipe, out = interrupted()
    directory = recipe.parent
    (directory / "task0.safetensors").write_bytes((directory / "task3.safetensors").read_bytes())
    opened.clear()
    merge_to_file(recipe, out, OPTIONS)
    assert opened == ["task0", "task2"]  # task3 has the same content


@pytest.mark.parametrize("change", [{"rank": 3}, {"router": {"layer": 0}}])
def test_other_settings_do_not_take_old_factors(interrupted, opened, change):
    recipe, out = interrupted()
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | change))
    opened.clear()
    merge_to_file(recipe, out, OPTIONS)
    assert opened == ["task0", "task1", "task2", "task3"]


def test_another_order_and_other_names_take_the_same_factors(interrupted, opened):
    recipe, out = interrupted()
    data = yaml.safe_load(recipe.read_text())
    data["tasks"].reverse()
    data["tasks"][-1]["name"] = "renamed"
    recipe.write_text(yaml.safe_dump(data))
    opened.clear()
    merge_to_file(recipe, out, OPTIONS)
    assert opened == ["task3", "task2"]


def test_damaged_factors_are_made_again(interrupted, opened):
    recipe, out = interrupted()
    for file in out.with_name(".merged.safetensors.factors").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    opened.clear()
    merge_to_file(recipe, out, OPTIONS)
    assert opened == ["task0", "task1", "task2", "task3"]


def test_an_empty_cache_holds_nothing_and_is_no_directory(tmp_path):
    cache = FactorCache(tmp_path / "none")
    assert cache.load(cache.key(base="a")) is None
    cache.clear()
    assert not (tmp_path / "none").exists()
    assert cache.key(a=1, b=2) == cache.key(b=2, a=1) != cache.key(a=1, b=3)
