"""Checks that settings make of themselves; every failure is a RecipeError with what was expected and got."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self, TypeGuard, get_args

from mass_export.errors import RecipeError


def require(condition: bool, message: str) -> None:  # noqa: FBT001
    """Raise RecipeError with `message` unless `condition`."""
    if not condition:
        raise RecipeError(message)


def require_choice(name: str, value: object, literal: Any) -> None:
    """Raise RecipeError unless `value` is one of the Literal's values."""
    choices = get_args(literal)
    require(value in choices, f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}.")


def is_int(value: object) -> TypeGuard[int]:
    """True for integers proper, not for booleans."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """True for finite int or float, not for booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # isfinite fails where an int is too large


def require_at_least(name: str, value: object, low: int, *, optional: bool = False) -> None:
    """Raise RecipeError unless `value` is an integer >= `low`, or None if `optional`."""
    fits = (optional and value is None) or (is_int(value) and value >= low)
    require(fits, f"{name}: expected an integer >= {low}, got {value!r}.")


def is_there(path: Path, *, file: bool = False) -> bool:
    """Whether there is such a path (such a file). One that the system refuses, because it is too long, is not there."""
    try:
        return path.is_file() if file else path.exists()
    except OSError:
        return False


class FromMapping:
    """Build a frozen dataclass from a parsed mapping, refusing unknown keys."""

    @classmethod
    def from_mapping(cls, data: object, where: str, key: str) -> Self:
        """Make the settings from parsed YAML or JSON; the file `where` and its `key` are named in errors.

        Raises:
            RecipeError: not a mapping, an unknown key, or an invalid value.
        """
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        try:
            return cls(**checked_mapping(data, known, key))
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error


def checked_mapping(
    data: object, known: Collection[str], key: str, required: Collection[str] = ()
) -> dict[str, Any]:
    """`data` as a dict, if it is a mapping with no key but the `known` and with all the `required`.

    Raises:
        RecipeError: naming `key` and every unknown or missing key in it.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{key}: expected a mapping with the keys {', '.join(known)}; got {data!r}.")
    unknown = sorted(str(name) for name in data if name not in known)
    require(not unknown, f"{key}: unknown key(s) {', '.join(unknown)}; known are {', '.join(known)}.")
    missing = [name for name in required if data.get(name) is None]
    require(not missing, f"{key}: missing key(s) {', '.join(missing)}.")
    return dict(data)
