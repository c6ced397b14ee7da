"""Head files, or class names -> one linear head per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mass_export.checkpoints import float32_parameters
from mass_export.errors import CheckpointError, HeadError, shortened
from mass_export.recipe_sources import HeadRecipe
from mass_export.tensor_files import open_tensors
from mass_export.zero_shot_heads import zero_shot_weight


@dataclass(frozen=True)
class Head:
    """`logits = weight @ feature + bias`, on the L2-normalised image feature.

    Attributes:
        weight: one row per class; a zero-shot head includes exp(logit_scale). [C, E] float32
        bias: or None. [C] float32
    """

    weight: Tensor
    bias: Tensor | None = None


def load_head(recipe: HeadRecipe, task: str, classes: Sequence[str], embed_dim: int) -> Head:
    """Load or make a task's head and check it against its classes and the width E of the image feature.

    Raises:
        HeadError: the file or a tensor is missing, or a shape or value does not fit.
    """
    where = f"task {task}: head: {recipe.file}"
    if recipe.prompts is not None:
        weight = zero_shot_weight(recipe.file, recipe.prompts, where, allow_pickle=recipe.allow_pickle)
        _check_shape(where, weight, (len(classes), embed_dim))
        return Head(weight)
    wanted = [recipe.tensor] if recipe.bias is None else [recipe.tensor, recipe.bias]
    try:
        tensors = open_tensors(recipe.file, allow_pickle=recipe.allow_pickle)
        found = float32_parameters({name: tensors[name] for name in wanted if name in tensors}, where)
    except CheckpointError as error:
        message = str(error)
        raise HeadError(message if message.startswith(where) else f"task {task}: head: {message}") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        named = " and no ".join(map(repr, missing))
        raise HeadError(f"{where}: no tensor {named}; it holds {shortened(sorted(tensors))}.")
    weight = found[recipe.tensor]
    bias = None if recipe.bias is None else found[recipe.bias]
    _check_shape(f"{where}: {recipe.tensor}", weight, (len(classes), embed_dim))
    if bias is not None:
        _check_shape(f"{where}: {recipe.bias}", bias, (len(classes),))
    return Head(weight, bias)


def _check_shape(where: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    got = tuple(tensor.shape)
    if got == expected:
        return
    if got[::-1] == expected:
        advice = "it looks transposed; store one row per class"
    elif len(got) == len(expected) and got[0] != expected[0]:
        advice = f"the task lists {expected[0]} classes and the head has {got[0]}; make them agree"
    elif len(got) == len(expected) == 2:
        advice = (
            f"the model's feature has width {expected[1]}, the head is for {got[1]}; use this model's head"
        )
    else:
        advice = "give the tensor of a linear head"
    raise HeadError(f"{where}: expected shape {list(expected)} (classes first), got {list(got)}: {advice}.")
