"""The YAML of recipes: safe, no larger than it may be, no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mass_export.errors import RecipeError

MAX_RECIPE_BYTES = 8 << 20


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which would let the last of two equal keys win, made to refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain text", key.start_mark)
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def parse_yaml(path: Path) -> object:
    """What a YAML file holds, with errors that name the place."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; not a recipe.")
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file; give the path of a recipe.") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{path}: not a valid recipe{place}: {problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path}: not YAML text; give the path of a recipe.") from error
