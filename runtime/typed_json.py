"""Parsed JSON -> dataclasses, checked field by field."""

from __future__ import annotations

import dataclasses
import json
import typing
from functools import cache
from typing import Any, Literal, TypeVar

from runtime.errors import BundleError

_MAX_FLOAT = 1e300
_T = TypeVar("_T")


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Build `kind` from parsed JSON; every mismatch names its place."""
    origin = typing.get_origin(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        made: Any = typed_dataclass(kind, value, where)
    elif origin is not None:
        made = _typed_generic(kind, origin, value, where)
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_FLOAT:
            raise BundleError(f"{where}: expected a finite number, got {_shortened(value)}.")
        made = float(value)
    else:
        if kind is not Any and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise BundleError(f"{where}: expected {kind.__name__}, got {_shortened(value)}.")
        made = value
    return made


def _typed_generic(kind: Any, origin: Any, value: Any, where: str) -> Any:
    args = typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise BundleError(
                f"{where}: expected one of {', '.join(map(str, args))}, got {_shortened(value)}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise BundleError(f"{where}: expected a list for {kind}, got {_shortened(value)}.")
        item_kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        pairs = zip(item_kinds, value, strict=True)
        return tuple(_typed(item_kind, item, f"{where}[{i}]") for i, (item_kind, item) in enumerate(pairs))
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, got {_shortened(value)}.")
        return {str(key): _typed(args[1], item, f"{where}.{key}") for key, item in value.items()}
    nested = [kind for kind in args if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Literal]
    if nested:  # a dataclass, or one of some texts, or None
        return None if value is None else _typed(nested[0], value, where)
    if not isinstance(value, args) or isinstance(value, bool):  # a union of plain types
        raise BundleError(f"{where}: expected {kind}, got {_shortened(value)}.")
    return value


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def typed_dataclass(kind: type[_T], value: Any, where: str) -> _T:
    """Build a dataclass, its fields and theirs from an object of JSON; every mismatch names its place.

    Args:
        kind: of fields that are dataclasses, tuples, texts with str keys, plain types, literals, or one of these or
            None.
        value: parsed.
        where: it is from.

    Raises:
        BundleError: a missing, unknown or ill-typed key.
    """
    if not isinstance(value, dict):
        raise BundleError(f"{where}: expected an object, got {value!r}.")
    hints, needed = _keys_of(typing.cast("Any", kind))
    unknown, missing = sorted(set(value) - set(hints)), sorted(needed - set(value))
    if unknown or missing:
        raise BundleError(f"{where}: missing keys {missing}, unknown keys {unknown}.")
    return kind(**{name: _typed(hints[name], item, f"{where}.{name}") for name, item in value.items()})


@cache
def _keys_of(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of a dataclass' fields by name, and which have no default."""
    needed = (field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
    return typing.get_type_hints(kind), frozenset(needed)
