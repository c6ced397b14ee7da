from __future__ import annotations

import numpy as np
import pytest
import torch

from mass_export.baselines import COEFFICIENTS, add_scaled, baselines_to_dict, evaluate_baselines
from mass_export.checkpoints import load_checkpoint
from mass_export.datasets import load_labelled_images
from mass_export.heads import load_head
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.vit import encode

QUIET = Progress(quiet=True)


def rows_of(recipe_path, data, **options):
    rows = evaluate_baselines(load_recipe(recipe_path), data, progress=QUIET, **options)
    return {row.name: row for row in rows}


def accuracy(recipe, params, task, data, split="test"):
    head = load_head(task.head, task.name, task.classes, recipe.vision.embed_dim)
    images = load_labelled_images(data, task, split)
    logits = (
        encode(params, torch.from_numpy(images.pixel_values(recipe.preprocess)), recipe.vision)
        @ head.weight.T
    )
    logits = logits if head.bias is None else logits + head.bias
    return np.mean(logits.argmax(dim=1).numpy() == images.labels)


def test_each_fine_tuned_model_is_scored_on_its_own_task(pico_data):
    rows = rows_of(*pico_data())
    assert rows["finetuned"].tasks == {"task0": 0.75, "task1": 0.75, "task2": 0.75}


def test_the_base_is_scored_with_every_head(pico_data):
    path, data = pico_data()
    recipe = load_recipe(path)
    base = load_checkpoint(recipe.base, recipe.vision)
    rows = rows_of(path, data)
    for task in recipe.tasks:
        assert rows["base"].tasks[task.name] == pytest.approx(accuracy(recipe, base, task, data))


def test_task_arithmetic_adds_the_scaled_sum_of_task_vectors(pico_data):
    recipe = load_recipe(pico_data()[0])
    base = load_checkpoint(recipe.base, recipe.vision)
    towers = [load_checkpoint(task.checkpoint, recipe.vision) for task in recipe.tasks]
    delta_sum = {name: sum(t[name].double() - p.double() for t in towers) for name, p in base.items()}
    merged = add_scaled(base, delta_sum, 0.5)
    for name, parameter in base.items():
        expected = parameter + 0.5 * sum(tower[name] - parameter for tower in towers)
        torch.testing.assert_close(merged[name], expected)


def test_the_coefficient_is_the_best_on_validation_images_and_never_looks_at_test_images(pico_data):
    path, data = pico_data()
    recipe = load_recipe(path)
    base = load_checkpoint(recipe.base, recipe.vision)
    towers = [load_checkpoint(task.checkpoint, recipe.vision) for task in recipe.tasks]
    delta_sum = {name: sum(t[name].double() - p.double() for t in towers) for name, p in base.items()}
    on_validation = {
        candidate: sum(
            accuracy(recipe, add_scaled(base, delta_sum, candidate), t, data, "val") for t in recipe.tasks
        )
        for candidate in COEFFICIENTS
    }
    settings = rows_of(path, data)["task_arithmetic"].settings
    assert on_validation[settings["coefficient"]] == max(on_validation.values())
    assert settings["chosen_on"] == "val"


def test_without_validation_images_the_coefficient_is_the_literature_s_and_the_row_says_so(pico_data):
    rows = rows_of(*pico_data(splits={"test": 8}))
    assert rows["task_arithmetic"].settings == {"coefficient": 0.3, "chosen_on": None}


def test_the_tsvm_row_has_rank_one_over_t_whatever_the_recipe_says(pico_data, tmp_path):
    path, data = pico_data(rank=1, base_merge="mean")
    plain, _ = pico_data(directory=tmp_path / "plain")
    recipe = load_recipe(plain)
    merged = merge(recipe, QUIET).merged
    rows = rows_of(path, data)
    for task in recipe.tasks:
        assert rows["tsvm"].tasks[task.name] == pytest.approx(accuracy(recipe, merged, task, data))


def test_rows_are_normalised_by_the_fine_tuned_average(pico_data):
    path, data = pico_data()
    rows = evaluate_baselines(load_recipe(path), data, progress=QUIET)
    table = baselines_to_dict(rows)
    assert table["finetuned"]["normalized_known_task_accuracy"] == 1.0
    expected = table["base"]["known_task_accuracy"] / 0.75
    assert table["base"]["normalized_known_task_accuracy"] == pytest.approx(expected)
