"""What a recipe points to: files, folders, repositories of the hub, lists of lines, and heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mass_export.checks import checked_mapping, is_there, require
from mass_export.errors import RecipeError
from mass_export.hub import fetch, is_hub_name

OPENAI_TEMPLATES = "openai"


@dataclass(frozen=True)
class Prompts:
    """What a zero-shot head is made of, besides the text tower.

    Attributes:
        classes: names as they stand in the prompts.
        templates: texts with `{}` for the name; None are OpenAI's for ImageNet.
        model_config: open_clip's, with `text_cfg`.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...] | None
    model_config: dict[str, Any]


@dataclass(frozen=True)
class HeadRecipe:
    """Where a head lies: a file, and the names of its tensors in it.

    Attributes:
        prompts: for a zero-shot head, which is made with the text tower that `file` holds.
        allow_pickle: whether `file` may be a pickled module.
    """

    file: Path
    tensor: str = "weight"
    bias: str | None = None
    prompts: Prompts | None = None
    allow_pickle: bool = False


def head_recipe(value: object, key: str, recipe: Path) -> HeadRecipe:
    """Parse `{file: .., tensor: .., bias: ..}`."""
    head = checked_mapping(value, ("file", "tensor", "bias"), key, required=("file", "tensor"))
    bias = head.get("bias")
    return HeadRecipe(
        file=file_source(head["file"], f"{key}.file", recipe),
        tensor=text(head["tensor"], f"{key}.tensor"),
        bias=None if bias is None else text(bias, f"{key}.bias"),
    )


def zero_shot_head_recipe(
    value: object, key: str, recipe: Path, base: Path, config: Mapping[str, Any], classes: tuple[str, ...]
) -> HeadRecipe:
    """Parse `{classes: .., templates: ..}`, both optional."""
    known = ("classes", "templates")
    require(
        isinstance(value, Mapping) and bool(set(value) & set(known)),
        f"{key}: missing key(s) file, tensor; or classes or templates, for a zero-shot head.",
    )
    head = checked_mapping(value, known, key)
    names = classes
    if head.get("classes") is not None:
        names = lines_of(head["classes"], f"{key}.classes", recipe, "class")
    require(
        len(names) == len(classes),
        f"{key}.classes: {len(names)} prompts for the task's {len(classes)} classes.",
    )
    templates = head.get("templates") or OPENAI_TEMPLATES
    lines = (
        None if templates == OPENAI_TEMPLATES else lines_of(templates, f"{key}.templates", recipe, "template")
    )
    for line in lines or ():
        require(line.count("{}") == 1, f"{key}.templates: {line!r} does not hold {{}} exactly once.")
    return HeadRecipe(file=base, prompts=Prompts(names, lines, dict(config)))


def file_source(value: object, key: str, recipe: Path) -> Path:
    """A file, relative to the recipe."""
    path = recipe.parent / text(value, key)
    require(is_there(path, file=True), f"{key}: no such file: {path} (paths are relative to the recipe).")
    return path


def checkpoint_source(value: object, key: str, recipe: Path, *, folder: bool = False) -> Path:
    """A file or folder, relative to the recipe, or a repository of the hub, which is fetched.

    Args:
        value: what the recipe says.
        key: where.
        recipe: its path.
        folder: whether it must be a folder.
    """
    name = text(value, key)
    if is_hub_name(name):
        return fetch(name, key)
    path = recipe.parent / name
    require(is_there(path), f"{key}: no such file: {path} (paths are relative to the recipe).")
    require(not folder or path.is_dir(), f"{key}: expected the folder of an adapter, got the file {path}.")
    return path


def lines_of(value: object, key: str, recipe: Path, what: str) -> tuple[str, ...]:
    """A list of texts, or the lines of a text file."""
    if isinstance(value, list):
        return tuple(text(name, f"{key}[{index}]") for index, name in enumerate(value))
    file = file_source(value, key, recipe)
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{key}: {file} is not a UTF-8 text file with one {what} a line.") from error
    empty = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    require(not empty, f"{key}: {file}: line(s) {empty} are empty; give one {what} a line.")
    return tuple(line.strip() for line in lines)


def text(value: object, key: str) -> str:
    """A text that is not empty."""
    hint = "; quote it" if isinstance(value, bool | int | float) else ""
    require(isinstance(value, str) and bool(value.strip()), f"{key}: expected text, got {value!r}{hint}.")
    return str(value)
