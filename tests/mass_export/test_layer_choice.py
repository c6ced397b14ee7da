from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mass_export.datasets import load_labelled_images
from mass_export.layer_choice import LayerScore, best_layer, score_layers, with_layer
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.recipe import load_recipe

QUIET = Progress(quiet=True)


def slow_scores(recipe, data, layer, mode):
    """What the eager model itself does with this layer, image by image."""
    router = dataclasses.replace(recipe.router, layer=layer, mode=mode)
    model = MassModel(merge(dataclasses.replace(recipe, router=router), QUIET))
    routed, joint = [], []
    for index, task in enumerate(recipe.tasks):
        images = load_labelled_images(data, task, "val")
        result = model.forward(torch.from_numpy(images.pixel_values(recipe.preprocess)))
        routed.append(np.mean(result.residuals.argmin(axis=1) == index))
        joint.append(np.mean((result.task_index == index) & (result.class_index == images.labels)))
    return np.mean(routed), np.mean(joint)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"router": {"site": "attn", "token": "mean", "norm": "l1"}},
        {"router": {"rank": 2}, "base_merge": "zeroshot"},
        {"compose": "sum", "router": {"threshold": 0.1, "max_tasks": 2}},
    ],
    ids=["paper", "attn-mean-l1", "router-rank", "sum"],
)
def test_every_layer_and_mode_scores_as_the_whole_model_with_that_layer_does(pico_data, keys):
    path, data = pico_data(**keys)
    recipe = load_recipe(path)
    scores = score_layers(recipe, data, progress=QUIET)
    assert [(s.layer, s.mode) for s in scores] == [(i, m) for m in ("topk", "top1") for i in range(3)]
    for score in scores:
        routed, joint = slow_scores(recipe, data, score.layer, score.mode)
        assert score.routing_accuracy == pytest.approx(routed)
        assert score.joint_accuracy == pytest.approx(joint)
        assert score.kept_accuracy >= score.joint_accuracy


def test_test_images_are_not_needed(pico_data):
    path, data = pico_data(splits={"val": 4})
    assert score_layers(load_recipe(path), data, modes=("top1",), progress=QUIET)


def test_the_best_layer_has_the_highest_joint_accuracy_then_routing_then_the_shorter_first_pass():
    scores = [
        LayerScore(0, "topk", 0.5, 0.9, 0.6),
        LayerScore(2, "topk", 0.7, 0.9, 0.8),
        LayerScore(1, "top1", 0.7, 0.7, 0.8),
        LayerScore(3, "topk", 0.6, 0.9, 0.8),
    ]
    assert best_layer(scores) == scores[2]


def test_the_chosen_layer_and_mode_go_into_the_recipe(pico_data):
    recipe = load_recipe(pico_data()[0])
    chosen = with_layer(recipe, LayerScore(0, "top1", 1, 1, 1)).router
    assert (chosen.layer, chosen.mode, chosen.threshold) == (0, "top1", recipe.router.threshold)
