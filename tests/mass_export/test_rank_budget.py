"""Ranks by energy at a given size."""

import pytest
import torch

from mass_export.errors import RecipeError
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.rank_budget import allot_ranks, rank_caps
from mass_export.recipe import load_recipe
from mass_export.spec import rank_of

QUIET = Progress(quiet=True)


def numbers(vision, ranks):
    shapes = vision.parameter_shapes()
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def uniform(vision, budget):
    shapes = vision.parameter_shapes()
    return {name: rank_of(shapes[name], budget, None) for name in vision.matrix_names()}


def spectra(vision, favourite):
    """One task whose energy lies in one matrix."""
    shapes = vision.parameter_shapes()
    return {
        name: (1.0 if name == favourite else 1e-3) * torch.linspace(1, 0.5, min(shapes[name]))
        for name in vision.matrix_names()
    }


def test_ranks_go_where_the_energy_is_and_take_no_more_than_the_ratio(pico_vision):
    favourite = "transformer.resblocks.1.mlp.c_fc.weight"
    caps = rank_caps(pico_vision, 0.2, 2)
    ranks = allot_ranks([spectra(pico_vision, favourite)] * 2, pico_vision, 0.2, caps)
    assert ranks[favourite] == caps[favourite] == 16
    assert all(1 <= ranks[name] <= caps[name] for name in caps)
    room = numbers(pico_vision, uniform(pico_vision, 0.2))
    assert room - max(sum(shape) for shape in pico_vision.parameter_shapes().values()) < numbers(
        pico_vision, ranks
    )
    assert numbers(pico_vision, ranks) <= room


def test_every_task_counts_alike_whatever_its_size(pico_vision):
    first, second = (f"transformer.resblocks.{i}.mlp.c_fc.weight" for i in (0, 1))
    loud = {name: 1000 * s for name, s in spectra(pico_vision, first).items()}
    caps = rank_caps(pico_vision, 0.1, 2)
    ranks = allot_ranks([loud, spectra(pico_vision, second)], pico_vision, 0.1, caps)
    assert abs(ranks[first] - ranks[second]) <= 1


def test_a_merge_by_budget_keeps_more_energy_than_the_same_ratio(pico_files, pico_vision):
    budget = merge(load_recipe(pico_files(rank_budget=0.2)), QUIET)
    ratio = merge(load_recipe(pico_files(rank_ratio=0.2)), QUIET)

    def energy(artifact):
        return sum(float(m.s.square().sum()) for task in artifact.tasks for m in task.matrices.values())

    def size(artifact):
        return numbers(pico_vision, {name: m.rank for name, m in artifact.tasks[0].matrices.items()})

    assert size(budget) <= size(ratio)
    assert energy(budget) > energy(ratio)
    ranks = [{name: m.rank for name, m in task.matrices.items()} for task in budget.tasks]
    assert ranks[0] == ranks[1] == ranks[2]
    for task, bases in zip(budget.tasks, budget.router_bases, strict=True):
        for name, basis in bases.items():
            assert torch.equal(basis, task.matrices[name].vh)


def test_the_routers_own_rank_is_kept(pico_files):
    artifact = merge(load_recipe(pico_files(rank_budget=0.1, router={"layer": 1, "rank": 9})), QUIET)
    assert [len(basis) for bases in artifact.router_bases for basis in bases.values()] == [9, 9, 9]


def test_mistakes_in_the_recipe_are_named(pico_files):
    with pytest.raises(RecipeError, match=r"rank_budget: expected a number in \(0, 1\].*got 2"):
        load_recipe(pico_files(rank_budget=2))
    with pytest.raises(RecipeError, match="rank_budget and rank: give one of them"):
        load_recipe(pico_files(rank_budget=0.1, rank=4))
