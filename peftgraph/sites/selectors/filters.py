"""Filters: what narrows a selection, by layer, stack, kind, expert, path and shape.

layers(2,6)   layers(-2,end)   layer(-1)   stack("decoder")   kind("cross")   expert(3)
.where(path="encoder.*")   .where(shape=(144,48))   .where(out_features=">=1024",in_features=48)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Final

from peftgraph.errors import PeftGraphError
from peftgraph.sites.selectors.select import Selector, as_selector, quoted, wrapped
from peftgraph.sites.site import Site
from peftgraph.utils.bounded_regex import regular

OPERATORS: Final[dict[str, Callable[[int, int], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Layers(Selector):
    """Sites of layers start up to but not including stop; None is the end. Negative numbers count from the end of
    each stack."""

    start: int
    stop: int | None

    def __post_init__(self) -> None:
        whole = _is_whole(self.start) and (self.stop is None or _is_whole(self.stop))
        _require(whole, f"layers(...) takes whole numbers, got {self.start!r} and {self.stop!r}.")
        if self.stop is not None and (self.start < 0) == (self.stop < 0) and self.start >= self.stop:
            raise PeftGraphError(
                f"layers({self.start},{self.stop}) holds no layer: the second number is the first layer left out."
            )

    def matches(self, site: Site) -> bool:
        if site.layer is None:
            return False
        start, stop = self.bounds(site.depth)
        return start <= site.layer and (stop is None or site.layer < stop)

    def bounds(self, depth: int | None) -> tuple[int, int | None]:
        """The range in a stack of `depth` layers; counted from an unknown end it is empty."""
        ends = [end for end in (self.start, self.stop) if end is not None and end < 0]
        if not ends:
            return self.start, self.stop
        if depth is None:
            return 0, 0
        start = self.start + depth if self.start < 0 else self.start
        return start, self.stop + depth if self.stop is not None and self.stop < 0 else self.stop

    def __str__(self) -> str:
        if self == layers(self.start):
            return f"layers({self.start})"
        return f"layers({self.start},{'end' if self.stop is None else self.stop})"


@dataclass(frozen=True)
class Stack(Selector):
    name: str

    def __post_init__(self) -> None:
        _check_word(self.name, "stack")

    def matches(self, site: Site) -> bool:
        return site.stack == self.name

    def __str__(self) -> str:
        return f"stack({quoted(self.name)})"


@dataclass(frozen=True)
class Kind(Selector):
    name: str

    def __post_init__(self) -> None:
        _check_word(self.name, "kind")

    def matches(self, site: Site) -> bool:
        return site.kind == self.name

    def __str__(self) -> str:
        return f"kind({quoted(self.name)})"


@dataclass(frozen=True)
class Expert(Selector):
    number: int

    def __post_init__(self) -> None:
        _require(_is_whole(self.number), f"expert(...) takes a whole number, got {self.number!r}.")

    def matches(self, site: Site) -> bool:
        return site.expert == self.number

    def __str__(self) -> str:
        return f"expert({self.number})"


@dataclass(frozen=True)
class Comparison:
    """What a number of features must satisfy."""

    sign: str
    number: int

    def holds(self, size: int) -> bool:
        return OPERATORS[self.sign](size, self.number)

    def __str__(self) -> str:
        return str(self.number) if self.sign == "==" else quoted(f"{self.sign}{self.number}")


@dataclass(frozen=True)
class Where(Selector):
    """The sites of `inner` whose path and shape are as asked; a name may only narrow what structure found."""

    inner: Selector
    path: str | None = None
    shape: tuple[int, ...] | None = None
    out_features: Comparison | None = None
    in_features: Comparison | None = None

    def __post_init__(self) -> None:
        if self.path is self.shape is self.out_features is self.in_features is None:
            raise PeftGraphError("where() needs one of path=, shape=, out_features= and in_features=.")
        sizes = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        _require(
            self.shape is None or (isinstance(self.shape, tuple) and bool(sizes) and all(map(_is_whole, sizes))),
            f"where(shape=...) takes a tuple of whole numbers, got {self.shape!r}.",
        )
        if self.path is None:
            return
        regular(self.path)
        # \" and " are one regular expression, and only the second can be written between quotes
        plain = re.sub(r"\\.", lambda pair: '"' if pair[0] == '\\"' else pair[0], self.path, flags=re.DOTALL)
        object.__setattr__(self, "path", plain)

    def matches(self, site: Site) -> bool:
        return self.inner.matches(site) and self.narrows_to(site)

    def narrows_to(self, site: Site) -> bool:
        """Does the condition itself hold?"""
        shape = site.shape or ()
        features = ((self.out_features, shape[:1]), (self.in_features, shape[1:2]))
        return (
            (self.path is None or regular(self.path).fullmatch(site.path))
            and (self.shape is None or site.shape == self.shape)
            and all(asked is None or (bool(size) and asked.holds(size[0])) for asked, size in features)
        )

    def parts(self) -> tuple[Selector, ...]:
        return (self.inner,)

    @property
    def condition(self) -> str:
        """The text after the selector that is narrowed, without its dot."""
        shape = None if self.shape is None else f"({','.join(map(str, self.shape))}{',' * (len(self.shape) == 1)})"
        given = {
            "path": None if self.path is None else quoted(self.path),
            "shape": shape,
            "out_features": self.out_features,
            "in_features": self.in_features,
        }
        return f"where({','.join(f'{key}={value}' for key, value in given.items() if value is not None)})"

    def __str__(self) -> str:
        return f"{wrapped(self.inner, 3)}.{self.condition}"


def comparison(value: int | str | None) -> Comparison | None:
    """48 or ">=1024" as a comparison.

    Raises:
        PeftGraphError: the text is no comparison with a whole number.
    """
    if value is None:
        return None
    found = re.fullmatch(r"\s*(<=|>=|==|!=|<|>)?\s*(\d{1,18})\s*", str(value)) if _is_compared(value) else None
    if found is None:
        raise PeftGraphError(f'{value!r} compares with nothing: write a number, or a text like ">=1024".')
    return Comparison(found[1] or "==", int(found[2]))


def _is_compared(value: object) -> bool:
    return isinstance(value, str) or _is_whole(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise PeftGraphError(words)


def _check_word(name: object, filter: str) -> None:
    """Refuses what the text of a selector cannot say."""
    plain = isinstance(name, str) and not {'"', "\\"} & set(name)
    _require(plain, f"{filter}(...) takes a name in which no quote and no backslash stands, got {name!r}.")


class _Alone:
    """The default of `layers`' second argument, for which None has a meaning."""


ALONE: Final = _Alone()


def layers(start: int, stop: int | _Alone | None = ALONE) -> Layers:
    """layers(2, 6): layers 2 to 5; layers(3): layer 3 alone; layers(-2, None): the last two of each stack."""
    if isinstance(stop, _Alone):
        return Layers(start, None if start == -1 else start + 1)
    return Layers(start, stop)


def layer(number: int) -> Layers:
    """One layer; -1 is the last."""
    return layers(number)


def stack(name: str) -> Stack:
    """Sites of one stack of blocks: "encoder", "decoder", or "tower0", "tower1", ... where there are several."""
    return Stack(name)


def kind(name: str) -> Kind:
    """Attention sites of one kind: "self" or "cross"."""
    return Kind(name)


def expert(number: int) -> Expert:
    """Sites of one expert, where a model holds its experts as separate modules."""
    return Expert(number)


def narrowed(
    selector: object, layer: int | None, stack: str | None, kind: str | None, expert: int | None, path: str | None
) -> Selector:
    """A selector and the filters that were given by keyword."""
    chosen = as_selector(selector)
    filters: list[Selector] = [] if layer is None else [layers(layer)]
    filters += [] if stack is None else [Stack(stack)]
    filters += [] if kind is None else [Kind(kind)]
    filters += [] if expert is None else [Expert(expert)]
    for one in filters:
        chosen = chosen & one
    return chosen if path is None else chosen.where(path=path)
