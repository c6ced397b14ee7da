"""One task -> its factors: from a fine-tuned checkpoint or from an adapter, matrix by matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mass_export.artifact import TaskFactors
from mass_export.checkpoints import open_parameters
from mass_export.lora import Product, adapted_tower, load_adapter
from mass_export.low_rank import LowRank, factorize, factorize_product
from mass_export.parallel import parallel_map
from mass_export.progress import Progress
from mass_export.recipe import Recipe, TaskRecipe
from mass_export.spec import VisionSpec, rank_of

Delta = Tensor | Product


class UnroutableTaskWarning(UserWarning):
    """The router has nothing to recognise a task by."""


@dataclass(frozen=True)
class TaskVector:
    """What a task changes, one parameter at a time, so that no second copy of the model is ever in memory.

    Attributes:
        delta: of a parameter: float64, or a product.
    """

    delta: Callable[[str], Delta]

    def dense(self, name: str) -> Tensor:
        """The delta of one parameter in full. float64"""
        delta = self.delta(name)
        return delta.left @ delta.right if isinstance(delta, Product) else delta


def load_task_tower(task: TaskRecipe, recipe: Recipe, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fine-tuned tower of a task, float32; for an adapter the base with the adapter in it."""
    if task.is_adapter:
        return adapted_tower(load_adapter(task.checkpoint, recipe.vision), base)
    return dict(_open_tower(task, recipe, base))


def _open_tower(task: TaskRecipe, recipe: Recipe, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return open_parameters(task.checkpoint, recipe.vision, allow_pickle=recipe.allow_pickle, base=base)


def open_task_vector(task: TaskRecipe, recipe: Recipe, base: Mapping[str, Tensor]) -> TaskVector:
    """Load a task's checkpoint or adapter."""
    if not task.is_adapter:
        tower = _open_tower(task, recipe, base)
        return TaskVector(lambda name: tower[name].double().sub_(base[name]))
    products = load_adapter(task.checkpoint, recipe.vision)

    def delta(name: str) -> Delta:
        shape = base[name].shape
        if name in products or len(shape) != 2:
            return products.get(name, torch.zeros(shape, dtype=torch.float64))
        nothing = torch.zeros(1, dtype=torch.float64)
        return Product(nothing.expand(shape[0], 1), nothing.expand(1, shape[1]))

    return TaskVector(delta)


def factorize_task(
    task_vector: TaskVector,
    ranks: Mapping[str, int],
    vision: VisionSpec,
    dtype: torch.dtype,
    progress: Progress,
    label: str,
) -> TaskFactors:
    """Split a task vector into low-rank matrices and whole vector deltas.

    Args:
        task_vector: computed in float64.
        ranks: of every matrix.
        vision: the tower.
        dtype: of the result.
        progress: where to show it.
        label: what to call the task there.
    """
    vectors = {
        name: task_vector.dense(name).to(dtype) for name in vision.parameter_shapes() if name not in ranks
    }

    def factors(name: str) -> LowRank:
        return factorize_delta(task_vector.delta(name), ranks[name]).to(dtype)

    names = list(ranks)
    found = progress.track(parallel_map(factors, names), label, total=len(names))
    return TaskFactors(dict(zip(names, found, strict=True)), vectors)


def factorize_delta(delta: Delta, rank: int) -> LowRank:
    """Factors of a dense delta or of a product; those of a product, or of zero, have no more triplets than it."""
    if isinstance(delta, Product):
        inner = min(*delta.left.shape, *delta.right.shape)
        return factorize_product(delta.left, delta.right, min(rank, inner))
    return factorize(delta, rank)


def ranks_of(task: TaskRecipe, vision: VisionSpec) -> dict[str, int]:
    """The rank of every matrix of a task, by its ratio or number."""
    shapes = vision.parameter_shapes()
    return {name: rank_of(shapes[name], task.rank_ratio, task.rank) for name in vision.matrix_names()}


def router_bases(
    task_vector: TaskVector, factors: TaskFactors, recipe: Recipe, dtype: torch.dtype, task: str
) -> dict[str, Tensor]:
    """Right bases of the matrices that read the taps, at the router's own rank if it has one. [R, D] each"""
    bases = {}
    for tap in recipe.router.taps(recipe.vision.layers):
        vh, rank = factors.matrices[tap.parameter].vh, recipe.router.rank
        if rank is not None and rank > vh.shape[0]:
            delta = task_vector.delta(tap.parameter)
            shape = recipe.vision.parameter_shapes()[tap.parameter]
            vh = factorize_delta(delta, min(rank, *shape)).vh.to(dtype)
        bases[tap.parameter] = vh[:rank].contiguous()
    if not any(basis.any() for basis in bases.values()):
        warnings.warn(
            f"task {task}: fine-tuning did not change {', '.join(bases)}, which the router compares images with: no "
            "image will be sent there. Choose a router.site (attn, mlp) or layer that the task changes.",
            UnroutableTaskWarning,
            stacklevel=2,
        )
    return bases
