"""The values of a pass's options: plain Python ones, so that what is printed is read back as what was given.

Numbers of numpy and members of enumerations are taken for what they are equal to; what no text can say (infinities, a
bool where a number belongs) is refused.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import inspect
import keyword
import math
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from peftgraph.sites.selector_parser import as_selector
from peftgraph.sites.selectors.selector import Selector

if TYPE_CHECKING:
    from torch import nn

LARGEST = 2**63  # of a whole number


_pass_reader: list[tuple[type, Callable[[str], object]]] = []  # the parser of specs, which stands above this module


def read_passes_with(cls: type, reader: Callable[[str], object]) -> None:
    """Say who parses the text that stands in the place of a pass, an option of another one."""
    _pass_reader[:] = [(cls, reader)]


def plain(value: Any, hint: Any) -> Any:
    """Convert a value to the plain type of an option; values of types without a text form are kept.

    Args:
        value: the given value.
        hint: the option's annotation.

    Raises:
        ValueError: it is of another kind; the message says which is expected.
        PeftGraphError: it is no selector.
    """
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if union else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind, *others = (one for one in kinds if one is not types.NoneType)
    if others:
        return value
    origin = typing.get_origin(kind) or kind
    if isinstance(value, str) and isinstance(origin, type) and any(issubclass(origin, cls) for cls, _ in _pass_reader):
        return _pass_reader[0][1](value)
    if origin is tuple:
        return _tuple(value, typing.get_args(kind))
    if isinstance(origin, type) and issubclass(origin, Selector):
        return as_selector(value)
    if origin is bool:
        return _bool(value)
    if origin is int:
        return _whole(value)
    if origin is float:
        return _number(value)
    return _text(value) if origin in (str, typing.Literal) else value


def word_problem(option: str, value: object, hint: Any) -> str | None:
    """Return what is wrong with the value of an option that takes one of some words; None where nothing is, or the
    option is of another type."""
    words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return None if not words or value in words else one_of(option, value, words)


def one_of(option: str, value: object, words: Iterable[object]) -> str:
    """Return the message that an option's value is none of its words."""
    known = " or ".join(f'"{word}"' for word in words)
    return f"{option} must be {known}, got {value!r}."


@cache
def hints(cls: type) -> dict[str, Any]:
    """Return the types of the options of a pass, by name.

    Annotations that use names local to a function, such as those of a class defined in one, cannot be evaluated:
    such an option has the type of its default if that is a selector, otherwise any type.
    """
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {item.name: _evaluated(cls, item) for item in dataclasses.fields(cls)}


def _evaluated(cls: type, item: dataclasses.Field[Any]) -> Any:
    if not isinstance(item.type, str):
        return item.type
    owner = next((base for base in cls.__mro__ if item.name in inspect.get_annotations(base)), cls)
    try:
        return eval(item.type, vars(sys.modules.get(owner.__module__, builtins)))  # as typing.get_type_hints does
    except NameError:
        return Selector if isinstance(item.default, Selector) else Any


def check_name(name: str) -> None:
    """Refuse a name of a pass that cannot be part of the names of its parameters, which are attributes of modules.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if not name.isidentifier():
        raise ValueError(f"a name must be an identifier (letters, digits, _), got {name!r}")
    if keyword.iskeyword(name) or hasattr(_module(), name):
        what = "a word of Python" if keyword.iskeyword(name) else "an attribute of every module"
        raise ValueError(f"a name becomes part of parameter names, and {name!r} is {what}; choose another")


@cache
def _module() -> nn.Module:
    from torch import nn

    return nn.Module()


def _tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError("expected a list")
    values = tuple(value)
    if not kinds:
        return values
    if kinds[-1] is Ellipsis:
        return tuple(plain(one, kinds[0]) for one in values)
    if len(values) != len(kinds):
        raise ValueError(f"expected a list of {len(kinds)}")
    return tuple(plain(one, kind) for one, kind in zip(values, kinds, strict=True))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise ValueError("expected true or false")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or (hasattr(value, "shape") and value.shape):
        raise ValueError("expected a whole number")
    found = operator.index(value)
    if abs(found) >= LARGEST:
        raise ValueError("expected a whole number that fits 64 bits")
    return found


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("expected a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError("expected a finite number")
    return int(value) if isinstance(value, int) else found  # 16 prints as it was written


def _text(value: Any) -> str:
    if isinstance(value, enum.Enum) and isinstance(value.value, str):
        value = value.value
    if not isinstance(value, str):
        raise ValueError("expected text")
    return str(value)
