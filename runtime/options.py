"""What a caller may ask of a classifier: checked, and put in place of the bundle's settings."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from runtime.bundle import GateMode, HeadChoice, RouterSpec
from runtime.errors import InputError
from runtime.manifest_checks import router_fault


def overridden(router: RouterSpec, **overrides: Any) -> RouterSpec:
    """A bundle's settings with those replaced that are not None.

    Raises:
        InputError: one is ill-typed or out of range.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        if name == "max_tasks":
            require_count(name, value)
        elif name in ("threshold", "temperature", "unknown_threshold"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name}: expected a finite number, got {value!r}.")
        else:
            require_choice(name, value, {"mode": GateMode, "head_choice": HeadChoice}[name])
    router = dataclasses.replace(router, **given)
    if fault := router_fault(router):
        raise InputError(f"{fault}.")
    return router


def require_choice(name: str, value: object, literal: Any) -> None:
    """Refuse what is not one of a Literal's texts.

    Raises:
        InputError: it is not.
    """
    choices = typing.get_args(literal)
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")


def require_count(name: str, value: object) -> None:
    """Refuse what is no positive integer.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: expected an integer >= 1, got {value!r}.")
