"""Narrow a selection by layer, stack, kind of attention and expert.

layers(2,6)   layers(-2,end)   layer(-1)   stack("decoder")   kind("cross")   expert(3)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from peftgraph.errors import PeftGraphError
from peftgraph.sites.selectors.selector import Selector, as_selector, is_whole, quoted, require
from peftgraph.sites.site import Site


@dataclass(frozen=True)
class Layers(Selector):
    """Sites of layers start up to but not including stop; None is the end. Negative numbers count from the end of
    each stack."""

    start: int
    stop: int | None

    def __post_init__(self) -> None:
        whole = is_whole(self.start) and (self.stop is None or is_whole(self.stop))
        require(whole, f"layers(...) takes whole numbers, got {self.start!r} and {self.stop!r}.")
        if self.stop is not None and (self.start < 0) == (self.stop < 0) and self.start >= self.stop:
            raise PeftGraphError(
                f"layers({self.start},{self.stop}) contains no layer: the second number is the first layer left out."
            )

    def matches(self, site: Site) -> bool:
        if site.layer is None:
            return False
        start, stop = self.bounds(site.depth)
        return start <= site.layer and (stop is None or site.layer < stop)

    def bounds(self, depth: int | None) -> tuple[int, int | None]:
        """Return the range in a stack of `depth` layers; counted from an unknown end it is empty."""
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
        require(is_whole(self.number), f"expert(...) takes a whole number, got {self.number!r}.")

    def matches(self, site: Site) -> bool:
        return site.expert == self.number

    def __str__(self) -> str:
        return f"expert({self.number})"


def _check_word(name: object, filter: str) -> None:
    """Refuse a word that the text of a selector cannot express."""
    plain = isinstance(name, str) and not {'"', "\\"} & set(name)
    require(plain, f"{filter}(...) takes a name in which no quote and no backslash stands, got {name!r}.")


class _Alone:
    """The default of `layers`' second argument, for which None has a meaning."""


ALONE: Final = _Alone()


def layers(start: int, stop: int | _Alone | None = ALONE) -> Layers:
    """Select sites by layer. layers(2, 6): layers 2 to 5; layers(3): layer 3 alone; layers(-2, None): the last two of
    each stack."""
    if isinstance(stop, _Alone):
        return Layers(start, None if start == -1 else start + 1)
    return Layers(start, stop)


def layer(number: int) -> Layers:
    """Select the sites of one layer; -1 is the last."""
    return layers(number)


def stack(name: str) -> Stack:
    """Select the sites of one stack of blocks: "encoder", "decoder", or "tower0", "tower1", ... where there are
    several."""
    return Stack(name)


def kind(name: str) -> Kind:
    """Attention sites of one kind: "self" or "cross"."""
    return Kind(name)


def expert(number: int) -> Expert:
    """Select the sites of one expert, where a model's experts are separate modules."""
    return Expert(number)


def narrowed(
    selector: object, layer: int | None, stack: str | None, kind: str | None, expert: int | None, path: str | None
) -> Selector:
    """Return a selector and the filters that were given by keyword."""
    chosen = as_selector(selector)
    filters: list[Selector] = [] if layer is None else [layers(layer)]
    filters += [] if stack is None else [Stack(stack)]
    filters += [] if kind is None else [Kind(kind)]
    filters += [] if expert is None else [Expert(expert)]
    for one in filters:
        chosen = chosen & one
    return chosen if path is None else chosen.where(path=path)
