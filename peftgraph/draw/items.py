"""What stands on a line of a block: parts of the base, several lines side by side, branches of the residual stream.

Everything is drawn around x = 0, from y = 0 down.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from peftgraph.draw.algebra import Letters
from peftgraph.draw.columns import FLAT
from peftgraph.draw.inserted import Insertion, Read
from peftgraph.draw.lane import Layout
from peftgraph.draw.shapes import Box, Circle, Shape, Words, mirrored, moved, wire

if TYPE_CHECKING:
    from peftgraph.draw.lines import Line

GAP, LANE, ROUND, FORK = 15.0, 20.0, 8.0, 10.0
NARROWEST, MARK = 66.0, 16.0
CORNER = 7.0  # the wire that leads to a line ends as far behind its corner


@dataclass(frozen=True)
class Span:
    """Room that is taken between two heights, from `left` to `right` of the line."""

    top: float
    bottom: float
    left: float
    right: float


@dataclass
class Drawn:
    """What a line or an item is drawn as, around x = 0 and from y = 0 on."""

    shapes: list[Shape] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    y: float = 0.0

    @property
    def left(self) -> float:
        """The leftmost x."""
        return min((span.left for span in self.spans), default=0.0)

    @property
    def right(self) -> float:
        """The rightmost x."""
        return max((span.right for span in self.spans), default=0.0)

    def take(self, other: Drawn, dx: float, dy: float) -> None:
        """Adds another drawing at a place; `y` stays."""
        self.shapes += moved(other.shapes, dx, dy)
        self.spans += [Span(s.top + dy, s.bottom + dy, s.left + dx, s.right + dx) for s in other.spans]

    def flipped(self) -> Drawn:
        """As seen in a mirror on the line."""
        spans = [Span(s.top, s.bottom, -s.right, -s.left) for s in self.spans]
        return Drawn(mirrored(self.shapes, 0.0), spans, self.y)


@dataclass
class Colours:
    """What drawing an insertion needs: its pass's CSS class, and letters for shapes."""

    letters: Letters
    classes: dict[int, str]


@dataclass
class BoxItem:
    """A part of the base.

    Attributes:
        marks: what of it trains: (CSS class of the pass, "W" or "b").
    """

    label: str
    detail: str = ""
    tip: str = ""
    kind: str = "base"
    width: float = 150.0
    height: float = FLAT
    marks: list[tuple[str, str]] = field(default_factory=list)

    def draw(self, colours: Colours) -> Drawn:
        """A box in the middle, the marks on its right side."""
        half = self.width / 2
        shapes: list[Shape] = [Box(self.kind, -half, 0, self.width, self.height, self.label, self.detail, self.tip)]
        x = half - MARK / 2
        for kind, text in self.marks:
            y = (self.height - MARK) / 2
            shapes.append(Box(f"inserted mark-of {kind}", x, y, MARK, MARK, text, "", f"{text} trains", 4))
            x += MARK + 3
        return Drawn(shapes, [Span(0, self.height, -half, max(half, x - 3) if self.marks else half)], self.height)


@dataclass
class BendItem:
    """A nonlinearity."""

    tip: str

    def draw(self, colours: Colours) -> Drawn:
        """A circle."""
        return Drawn([Circle(0, ROUND, "bend", self.tip)], [Span(0, 2 * ROUND, -ROUND, ROUND)], 2 * ROUND)


@dataclass
class RowItem:
    """Lines side by side that start from one value and meet: q, k and v in the core, gate and up in their product.

    Attributes:
        meets: "core", "times", or "" where the lines do not meet.
        remote: the lines that start from another value, which comes from the right.
        fused: whether one weight holds them.
    """

    lines: list[Line]
    meets: Literal["core", "times", ""]
    core: BoxItem | None = None
    remote: tuple[int, ...] = ()
    fused: bool = False
    inside: list[Insertion] = field(default_factory=list)
    strange: dict[Read, str] = field(default_factory=dict)

    def draw(self, colours: Colours) -> Drawn:
        """The lines, the first with its lanes on the left and the others on the right."""
        lead = FORK if any(line.forks(0) for line in self.lines) else 0.0
        drawn = [line.draw(colours, lead) for line in self.lines]
        drawn = [one.flipped() if i == 0 and len(drawn) > 1 else one for i, one in enumerate(drawn)]
        places = self._places(drawn)
        middle = (places[0] + places[-1]) / 2
        places = [x - middle for x in places]
        result, top = Drawn(), FORK
        low = max(one.y for one in drawn)
        if self.fused:
            box = Box("base bridge", places[0], top + GAP, places[-1] - places[0], 38.0, radius=0)
            result.shapes.append(box)
        for i, (one, x) in enumerate(zip(drawn, places, strict=True)):
            result.take(one, x, top)
            if i in self.remote:
                edge = max(p + d.right for p, d in zip(places, drawn, strict=True)) + 24
                result.shapes.append(wire((edge, top), (x, top), (x, top + CORNER), arrow=False))
                result.spans.append(Span(top - 2, top + 2, x, edge))
            else:
                result.shapes.append(wire((0, 0), (0, top), (x, top), (x, top + CORNER), arrow=False))
            result.shapes.append(wire((x, top + one.y), (x, top + low), arrow=False))
        if self.remote:
            result.shapes.append(Words(result.right, top - 6, "memory", "detail", "end"))
        result.y = top + low
        self._meet(result, places, colours)
        return result

    def _places(self, drawn: Sequence[Drawn]) -> list[float]:
        places = [0.0]
        for one, other in itertools.pairwise(drawn):
            touching = self.fused and one.right <= NARROWEST / 2 and other.left >= -NARROWEST / 2
            places.append(places[-1] + one.right - other.left + (0 if touching else 12))
        return places

    def _meet(self, result: Drawn, places: Sequence[float], colours: Colours) -> None:
        if self.meets == "core":
            assert self.core is not None
            result.shapes += [wire((x, result.y), (x, result.y + GAP)) for x in places]
            self.core.width = places[-1] - places[0] + NARROWEST
            result.take(self.core.draw(colours), 0, result.y + GAP)
            result.y += GAP + self.core.height
            for one in self.inside:
                self._enter(result, one, colours)
        elif self.meets == "times":
            y = result.y + ROUND
            for x in (places[0], places[-1]):
                edge = -ROUND if x < 0 else ROUND
                result.shapes.append(wire((x, result.y), (x, y), (edge, y)))
            result.shapes.append(Circle(0, y, "times", "ffn.hidden: the gate's nonlinearity times up"))
            result.spans.append(Span(result.y, y + ROUND, places[0], places[-1]))
            result.y = y + ROUND

    def _enter(self, result: Drawn, one: Insertion, colours: Colours) -> None:
        """What enters inside the core: a lane whose result comes to it from the right."""
        assert self.core is not None
        kind, edge = colours.classes[one.application], self.core.width / 2
        layout = Layout(one, colours.letters, kind, self.strange)
        height = layout.drawn(0, {}).bottom
        lane = layout.drawn(result.y - self.core.height / 2 - GAP - height, {})
        x = max(s.right for s in result.spans if s.bottom > lane.top) + LANE
        y = result.y - self.core.height / 2
        out = x + lane.out[0]
        result.shapes += moved(lane.shapes, x, 0)
        result.shapes.append(wire((out, lane.out[1]), (out, y), (edge, y), kind=f"wire {kind}"))
        result.spans.append(Span(lane.top, y, edge, x + lane.width))


@dataclass
class BranchItem:
    """The sublayers between two points of the residual stream, side by side, and the add where they come back."""

    lines: list[Line]
    centre: float = 0.0  # how far from the stream the first column stands at least

    def draw(self, colours: Colours) -> Drawn:
        """The columns to the right of the stream."""
        result, x = Drawn(y=0.0), 0.0
        drawn = [line.draw(colours) for line in self.lines]
        ends: list[float] = []
        low = max(one.y for one in drawn) + ROUND + GAP
        for one in drawn:
            centre = max(x - one.left, self.centre)
            result.take(one, centre, ROUND)
            result.shapes.append(wire((0, ROUND), (centre, ROUND), (centre, ROUND + CORNER), arrow=False))
            ends.append(centre)
            x = centre + one.right + 22
        for centre, one in zip(ends, drawn, strict=True):
            result.shapes.append(wire((centre, ROUND + one.y), (centre, low), (ROUND, low)))
        result.spans.append(Span(0, low, -ROUND, max(ends)))
        result.shapes.append(wire((0, 0), (0, low - ROUND), kind="stream", arrow=False))
        result.shapes.append(Circle(0, low, "plus", "the residual add"))
        result.y = low + ROUND
        return result


@dataclass
class GapItem:
    """Blocks that are left out."""

    text: str

    def draw(self, colours: Colours) -> Drawn:
        """A dotted piece of the stream, with words."""
        shapes: list[Shape] = [wire((0, -4), (0, 26), kind="stream gap", arrow=False), Words(14, 16, self.text)]
        return Drawn(shapes, [Span(0, 22, -2, 14 + 6.4 * len(self.text))], 22.0)


Item = BoxItem | BendItem | RowItem | BranchItem | GapItem
