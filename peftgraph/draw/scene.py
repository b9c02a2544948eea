"""The scene of a block: the paths of its signal as lines, and what stands on them. It is data; `layout` draws it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from peftgraph.draw.insertion_diagram import Diagram
from peftgraph.draw.insertions import Insertion, OuterValue
from peftgraph.draw.model_outline import Component, Sublayer


@dataclass(frozen=True)
class Arrival:
    """An insertion at the station where it enters a line.

    Attributes:
        insertion: what enters.
        css: the CSS class of its pass's colour.
        diagram: its operations.
        stations: for each value that it reads from its line, the station at which it does.
    """

    insertion: Insertion
    css: str
    diagram: Diagram
    stations: dict[OuterValue, int] = field(default_factory=dict)


@dataclass(eq=False)
class Line:
    """A path of the signal: elements from the top down, with a station before the first and after each.

    Attributes:
        elements: what stands on it.
        arrivals: for each station, what enters there, inner insertions first.
        css: the CSS class of its wires.
        arrow: whether it ends in an arrow.
    """

    elements: list[Element] = field(default_factory=list)
    arrivals: dict[int, list[Arrival]] = field(default_factory=dict)
    css: str = "wire"
    arrow: bool = False

    def lines(self) -> Iterator[Line]:
        """Yield this line, then all its branches."""
        yield self
        for element in self.elements:
            for line in inner_lines(element):
                yield from line.lines()

    def forks(self, station: int) -> bool:
        """Tell whether something forks off the line at a station and enters it further down."""
        return any(
            station in one.stations.values() for place, ones in self.arrivals.items() for one in ones if place > station
        )


@dataclass(eq=False)
class LabelledBox:
    """A component of the model as a box.

    Attributes:
        role: what it plays.
        square: whether its corners are, as those of a box that touches others.
        components: the component, of every block that is drawn as one; none for an attention's core.
        marks: what of it trains: (CSS class of the pass, "W", "g" or "b").
    """

    role: str
    label: str
    detail: str = ""
    tip: str = ""
    css: str = "base"
    width: float = 0.0
    height: float = 0.0
    square: bool = False
    components: Sequence[Component] = ()
    marks: list[tuple[str, str]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What it is found by on a page."""
        return self.components[0].key if self.components else ""


@dataclass(eq=False)
class Nonlinearity:
    """The nonlinearity of a feed-forward without a gate."""

    tip: str


@dataclass(eq=False)
class SideBySide:
    """Lines that start from one value: q, k and v, which meet in the core; gate and up, which meet in a product.

    Attributes:
        lines: from left to right.
        meeting: where they end; "join" where they are brought together for what reads all of them.
        core: the box in which they meet.
        remote: the lines that start from another value, the memory, which comes from the right.
        remote_css: the CSS class of the wires to them.
        fused: whether one weight holds the boxes of all lines.
        tip: of the product.
        inside: what enters between the operands of the core and its result.
    """

    lines: list[Line]
    meeting: Literal["core", "times", "bend", "join"]
    core: LabelledBox | None = None
    remote: tuple[int, ...] = ()
    remote_css: str = "memory"
    fused: bool = False
    tip: str = ""
    inside: list[Arrival] = field(default_factory=list)


@dataclass(eq=False)
class Gated:
    """A line, and a value beside it that weighs its result or, as a router does, chooses what of it is computed.

    Attributes:
        main: the line.
        gate: what the value is made by.
        enters: whether the value multiplies the result or goes to the experts on the line.
        css: the CSS class of the value's wires.
        tip: of the product.
    """

    main: Line
    gate: Line
    enters: Literal["result", "experts"] = "result"
    css: str = "wire"
    tip: str = ""


@dataclass(eq=False)
class Experts:
    """Several copies of a line, each with parameters of its own, drawn as a pile."""

    line: Line
    label: str


@dataclass(eq=False)
class ResidualBranch:
    """The sublayers between two points of the residual stream, side by side, and the add where they come back.

    Attributes:
        lines: one for each sublayer, or for each part of one.
        sublayers: whose line each is.
        head: what stands before all of them, a norm that they share.
    """

    lines: list[Line]
    sublayers: list[Sublayer]
    head: Line | None = None


@dataclass(eq=False)
class Note:
    """Words in the place of what is not shown; of blocks that are left out, the wire is dotted."""

    text: str
    dotted: bool = False


Element = LabelledBox | Nonlinearity | SideBySide | Gated | Experts | ResidualBranch | Note


def inner_lines(element: Element) -> list[Line]:
    """Return the lines that an element is made of."""
    match element:
        case SideBySide():
            return element.lines
        case Gated():
            return [element.main, element.gate]
        case Experts():
            return [element.line]
        case ResidualBranch():
            return [*element.lines, *([element.head] if element.head is not None else [])]
        case _:
            return []
