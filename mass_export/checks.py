"""Checks that settings make of themselves; every failure is a RecipeError with what was expected and got."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self, get_args

from mass_export.errors import RecipeError


def require(condition: bool, message: str) -> None:  # noqa: FBT001
    """Raise RecipeError with `message` unless `condition`."""
    if not condition:
        raise RecipeError(message)


def require_choice(name: str, value: object, literal: Any) -> None:
    """Raise RecipeError unless `value` is one of the Literal's values."""
    choices = get_args(literal)
    require(value in choices, f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}.")


def is_int(value: object) -> bool:
    """True for integers proper, not for booleans."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """True for finite int or float, not for booleans."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_at_least(name: str, value: object, low: int, *, optional: bool = False) -> None:
    """Raise RecipeError unless `value` is an integer >= `low`, or None if `optional`."""
    fits = (optional and value is None) or (isinstance(value, int) and is_int(value) and value >= low)
    require(fits, f"{name}: expected an integer >= {low}, got {value!r}.")


class FromMapping:
    """Build a frozen dataclass from a parsed mapping, refusing unknown keys."""

    @classmethod
    def from_mapping(cls, data: object, where: str) -> Self:
        """Make the settings from parsed YAML or JSON; `where` is named in errors.

        Raises:
            RecipeError: not a mapping, an unknown key, or an invalid value.
        """
        require(isinstance(data, Mapping), f"{where}: expected a mapping, got {data!r}.")
        assert isinstance(data, Mapping)
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(str(key) for key in data if key not in known)
        require(not unknown, f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}.")
        try:
            return cls(**data)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        except TypeError as error:
            raise RecipeError(f"{where}: {error}.") from error
