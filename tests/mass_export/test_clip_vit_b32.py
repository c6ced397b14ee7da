"""The example of the public checkpoints, as far as it goes without a network."""

from pathlib import Path
from runpy import run_path

import pytest
import yaml

from mass_export.errors import HubError
from mass_export.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "clip_vit_b32"
CARD = """---
license: mit
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': abbey
          '10': airplane_cabin
          '2': zen_garden
---
# Card
"""


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A copy of the recipe with class files, and a hub whose repositories are empty folders."""
    recipe = yaml.safe_load((EXAMPLE / "recipe.yaml").read_text())
    fetched = []
    (tmp_path / "repository").mkdir()
    monkeypatch.setattr("mass_export.recipe_sources.fetch", lambda name, _: fetched.append(name) or tmp_path)
    (tmp_path / "classes").mkdir()
    for task in recipe["tasks"]:
        if "classes" in task["head"]:
            (tmp_path / task["head"]["classes"]).write_text("one\ntwo\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path, fetched


def test_the_recipe_is_valid_and_names_eight_tasks_of_one_base(example):
    path, fetched = example
    recipe = load_recipe(path)
    assert [task.name for task in recipe.tasks] == [
        "sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd",
    ]  # fmt: skip
    assert fetched[0] == "hf:openai/clip-vit-base-patch32"
    assert all(name.startswith("hf:tanganke/clip-vit-base-patch32_") for name in fetched[1:])
    assert (recipe.vision.activation, recipe.vision.patch_size) == ("quick_gelu", (32, 32))
    assert all(task.head.prompts is not None for task in recipe.tasks)


def test_class_names_come_from_a_datasets_card_in_the_order_of_the_labels():
    names_from_card = run_path(str(EXAMPLE / "get_class_names.py"))["names_from_card"]
    assert names_from_card(CARD) == ["abbey", "zen garden", "airplane cabin"]


def test_without_network_and_cache_the_first_repository_is_named(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="base: hf:openai/clip-vit-base-patch32: not in the hub's cache"):
        load_recipe(EXAMPLE / "recipe.yaml")
