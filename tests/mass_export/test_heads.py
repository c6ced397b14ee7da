from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from mass_export.errors import HeadError
from mass_export.heads import load_head
from mass_export.recipe_sources import HeadRecipe
from mass_export.tensor_files import PickledModuleWarning

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def head_file(tmp_path):
    def write(weight=(3, 16), bias=(3,), **more):
        tensors = {"w": torch.ones(weight), "b": torch.ones(bias)} | more
        save_file(tensors, tmp_path / "heads.safetensors")
        return HeadRecipe(tmp_path / "heads.safetensors", "w", "b")

    return write


def load(recipe):
    return load_head(recipe, "pets", CLASSES, 16)


def test_a_head_is_float32_with_or_without_a_bias(head_file):
    recipe = head_file(w=torch.full((3, 16), 0.5, dtype=torch.float16))
    head = load(recipe)
    assert torch.equal(head.weight, torch.full((3, 16), 0.5))
    assert torch.equal(head.bias, torch.ones(3))
    assert load(HeadRecipe(recipe.file, "w")).bias is None


class ClassificationHead(torch.nn.Linear):
    """As the papers on merging pickle it."""

    def __init__(self):
        super().__init__(16, 3)
        self.normalize = True
        self.weight.data.mul_(100)


def test_a_pickled_head_is_read_only_when_told_to(tmp_path):
    module = ClassificationHead()
    torch.save(module, tmp_path / "head_pets.pt")
    recipe = HeadRecipe(tmp_path / "head_pets.pt", "weight", "bias")
    with pytest.raises(
        HeadError, match=r"task pets: head: .*head_pets\.pt: a pickle of more than tensors.*--allow-pickle"
    ):
        load(recipe)
    with pytest.warns(PickledModuleWarning, match="no code of them ran"):
        head = load(dataclasses.replace(recipe, allow_pickle=True))
    assert torch.equal(head.weight, module.weight)
    assert torch.equal(head.bias, module.bias)


def test_torch_files_hold_heads_too(tmp_path):
    torch.save({"classification_head.weight": torch.ones(3, 16)}, tmp_path / "head.pt")
    assert load(HeadRecipe(tmp_path / "head.pt", "classification_head.weight")).weight.shape == (3, 16)


@pytest.mark.parametrize(
    ("shapes", "pattern"),
    [
        (
            {"weight": (4, 16), "bias": (4,)},
            r"w: expected shape \[3, 16\].*lists 3 classes and the head has 4",
        ),
        ({"weight": (3, 8)}, r"w: .*feature has width 16, the head is for 8"),
        ({"weight": (16, 3)}, r"w: .*looks transposed"),
        ({"weight": (3,)}, r"w: .*linear head"),
        ({"bias": (4,)}, r"b: expected shape \[3\].*got \[4\]"),
        ({"bias": (3, 1)}, r"b: expected shape \[3\].*linear head"),
    ],
)
def test_a_head_of_another_shape_is_refused_with_the_reason(head_file, shapes, pattern):
    with pytest.raises(HeadError, match=rf"task pets: head: .*heads\.safetensors: {pattern}"):
        load(head_file(**shapes))


def test_missing_tensors_are_named_beside_those_in_the_file(head_file):
    recipe = head_file()
    with pytest.raises(HeadError, match=r"no tensor 'x' and no 'y'; it holds b, w\."):
        load(HeadRecipe(recipe.file, "x", "y"))


def test_unusable_values_are_refused(head_file):
    weight = torch.ones(3, 16)
    weight[1, 2] = float("nan")
    with pytest.raises(HeadError, match=r"task pets: head: .*w holds 1 NaN"):
        load(head_file(w=weight))
    with pytest.raises(HeadError, match=r"b is strided int64, not dense floating point"):
        load(head_file(b=torch.ones(3, dtype=torch.int64)))


def test_an_unreadable_head_file_names_the_task(tmp_path):
    (tmp_path / "head.pt").write_text("no tensors here")
    with pytest.raises(HeadError, match=r"task pets: head: .*head\.pt: neither safetensors"):
        load(HeadRecipe(tmp_path / "head.pt", "w"))
