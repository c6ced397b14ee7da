"""What a caller may ask of a classifier: checked, and put in place of the bundle's settings."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

from runtime.bundle import GateMode, HeadChoice, PreprocessSpec, RouterSpec
from runtime.device_array import DeviceArray
from runtime.errors import InputError
from runtime.manifest_checks import router_fault
from runtime.second_pass import TaskSet


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


def require_pixel_values(pixel_values: object, spec: PreprocessSpec) -> None:
    """Refuse what is no batch of images as the bundle takes them.

    Raises:
        InputError: another type, shape or dtype, an empty batch, NaN or infinity.
    """
    if not isinstance(pixel_values, np.ndarray | DeviceArray):
        raise InputError(f"pixel_values: expected a numpy array, got {type(pixel_values).__name__}.")
    if len(pixel_values.shape) != 4 or tuple(pixel_values.shape[1:]) != spec.input_shape:
        expected = ", ".join(map(str, spec.input_shape))
        raise InputError(f"pixel_values: expected shape [B, {expected}], got {list(pixel_values.shape)}.")
    if pixel_values.dtype != spec.dtype:
        raise InputError(f"pixel_values: expected {spec.dtype}, got {pixel_values.dtype}.")
    if not len(pixel_values):
        raise InputError("pixel_values: the batch is empty.")
    if isinstance(pixel_values, DeviceArray) or spec.dtype == "uint8":
        return
    unfit = np.flatnonzero(~np.isfinite(pixel_values).all(axis=(1, 2, 3)))
    if len(unfit):
        raise InputError(f"pixel_values: NaN or infinity in image {unfit[0]}.")


def allowed_tasks(tasks: Iterable[str] | None, known: tuple[str, ...]) -> TaskSet | None:
    """Indices of the given tasks, ascending; None for all.

    Raises:
        InputError: one is unknown or given twice, or there is none.
    """
    if tasks is None:
        return None
    if isinstance(tasks, str):
        raise InputError(f"tasks: expected several names, got one string; write [{tasks!r}].")
    names = list(tasks)
    unknown = [repr(name) for name in names if name not in known]
    if unknown or not names:
        fault = f"unknown {', '.join(unknown)}" if unknown else "none given"
        raise InputError(f"tasks: {fault}; this bundle has {', '.join(known)}.")
    if len(set(names)) != len(names):
        raise InputError(f"tasks: names repeat in {', '.join(names)}.")
    return tuple(sorted(known.index(name) for name in names))
