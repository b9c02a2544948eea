"""Lines of a block, each drawn from the top down, with what passes inserted in lanes beside them.

A line is items with stations between them; a value of the graph that an insertion reads or replaces belongs to a
station.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peftgraph.draw.inserted import Insertion, Read
from peftgraph.draw.items import (
    CORNER,
    FORK,
    GAP,
    LANE,
    ROUND,
    BendItem,
    BoxItem,
    BranchItem,
    Colours,
    Drawn,
    GapItem,
    Item,
    RowItem,
    Span,
)
from peftgraph.draw.lane import Lane, Layout
from peftgraph.draw.shapes import Circle, Shape, moved, wire

BESIDE = 30.0  # between a stream and the columns beside it


@dataclass
class Line:
    """Items from the top down.

    Attributes:
        items: what stands on it.
        values: for each station (before the first item, after each) the value that has its place there.
        arriving: for each station, what enters there, inner things first.
        parent: the line that it leaves.
        kind: the CSS class of its wires.
    """

    items: list[Item] = field(default_factory=list)
    values: list[str] = field(default_factory=lambda: [""])
    parent: Line | None = None
    kind: str = "wire"
    arriving: dict[int, list[Insertion]] = field(default_factory=dict)
    where: dict[tuple[str, Read], int | str] = field(default_factory=dict)

    def add(self, item: Item, value: str) -> None:
        """Puts an item last, and the value that it gives."""
        self.items.append(item)
        self.values.append(value)

    def lines(self) -> Iterator[Line]:
        """This line and all that leave it."""
        yield self
        for item in self.items:
            if isinstance(item, RowItem | BranchItem):
                for line in item.lines:
                    yield from line.lines()

    def forks(self, station: int) -> bool:
        """Whether something leaves the line at a station that enters it further down."""
        return any(
            self.where.get((one.after, read)) == station
            for place, ones in self.arriving.items()
            for one in ones
            for read in one.reads
            if place > station
        )

    def draw(self, colours: Colours, lead: float | None = None) -> Drawn:
        """The whole line.

        Args:
            colours: of insertions.
            lead: how much room there is before the first item; what the first forks need by default.
        """
        return _Pen(self, colours, lead).draw()

    def align(self, colours: Colours) -> None:
        """Gives the columns beside a stream one middle."""
        branches = [item for item in self.items if isinstance(item, BranchItem)]
        reach = max((-item.lines[0].draw(colours).left for item in branches), default=0.0)
        for item in branches:
            item.centre = reach + BESIDE


class _Pen:
    """A line that is being drawn."""

    def __init__(self, line: Line, colours: Colours, lead: float | None) -> None:
        self.line, self.colours = line, colours
        self.lead = lead if lead is not None else FORK if line.forks(0) else 0.0
        self.result = Drawn()
        self.below = CORNER if line.parent is not None else 0.0  # where the line's own wire was last drawn to
        self.heights: dict[int, float] = {}
        self.entered = ""  # what last entered at this station

    def draw(self) -> Drawn:
        """Station by station."""
        for station in range(len(self.line.values)):
            self._station(station)
            if station < len(self.line.items):
                self._item(self.line.items[station])
        if self.line.kind == "stream":
            self.result.y += GAP + 4
        self._wire(self.result.y, arrow=self.line.kind == "stream")
        self.result.spans.append(Span(0, self.result.y, -1, 1))
        return self.result

    def _wire(self, to: float, arrow: bool = True) -> None:
        if to > self.below:
            self.result.shapes.insert(0, wire((0, self.below), (0, to), kind=self.line.kind, arrow=arrow))
        self.below = to

    def _item(self, item: Item) -> None:
        if not isinstance(item, RowItem | BranchItem | GapItem) or (
            isinstance(item, BranchItem) and self.result.y == self.below
        ):
            self.result.y += GAP
        self._wire(self.result.y, arrow=isinstance(item, BoxItem | BendItem))
        drawn = item.draw(self.colours)
        self.result.take(drawn, 0, self.result.y)
        self.result.y += drawn.y
        self.below = self.result.y

    def _station(self, station: int) -> None:
        self.result.y += self.lead if station == 0 else FORK if self.line.forks(station) else 0.0
        self.heights[station] = self.result.y
        self.entered = ""
        for one in self.line.arriving.get(station, ()):
            self._arrive(one, station)

    def _arrive(self, one: Insertion, station: int) -> None:
        """One insertion: its forks, its lane, and where it enters."""
        places = {read: self.line.where[one.after, read] for read in one.reads}
        strange = {read: place for read, place in places.items() if isinstance(place, str)}
        at = {read: self._height(read, place, station) for read, place in places.items() if isinstance(place, int)}
        kind = self.colours.classes[one.application]
        layout = Layout(one, self.colours.letters, kind, strange)
        top = min(at.values(), default=self.result.y - GAP / 2)
        lane = layout.drawn(top, at)
        middle = lane.bottom - (lane.bottom - lane.top) / 2 if lane.sideways else lane.bottom + GAP - 2
        y = max(middle, self.result.y + GAP + ROUND)
        if lane.sideways:
            y = max(y, self.result.y + GAP + (lane.bottom - lane.top) / 2)
        self._lane(one, lane, at, y, kind)

    def _height(self, read: Read, place: int, station: int) -> float:
        """Where a wire to a read value leaves the line: below everything that has entered, if it reads that."""
        entered = self.line.arriving.get(station, [])
        first = not entered or not self.entered
        if place == station and (first or read.value == self.entered):
            return self.result.y + FORK
        return self.heights[place]

    def _lane(self, one: Insertion, lane: Lane, at: dict[Read, float], y: float, kind: str) -> None:
        shift = y - lane.out[1] if lane.sideways else 0.0
        top, bottom = lane.top + shift, max(lane.bottom + shift, y)
        upper = min([*at.values(), top])
        x = max([ROUND, *(s.right for s in self.result.spans if s.bottom > upper - 3 and s.top < bottom + 3)]) + LANE
        shapes, coloured = self.result.shapes, f"wire {kind}"
        trunks: list[Shape] = []
        for read, ends in lane.entries.items():
            start = at[read]
            for end in ends:
                to = (x + end.x, end.y + shift)
                trunks.append(wire((0, start), (to[0], start), to, kind=coloured, arrow=end.arrow))
            trunks.append(Circle(0, start, "dot", kind=f"dot {kind}"))
        out = (x + lane.out[0], lane.out[1] + shift)
        edge = 0.0 if one.sign == "replace" else ROUND
        turn = [] if lane.sideways else [(out[0], y)]
        trunks.append(wire(out, *turn, (edge, y), kind=coloured))
        if one.sign == "replace":  # the line itself ends where its value was read last
            self._wire(max(at.values(), default=self.below), arrow=False)
        else:
            self._wire(y - edge, arrow=False)
        shapes += [*trunks, *moved(lane.shapes, x, shift)]
        sign = "dot" if one.sign == "replace" else one.sign
        shapes.append(Circle(0, y, sign, "", f"{'dot' if sign == 'dot' else 'op'} {kind}"))
        self.below, self.entered = y + edge, one.after
        self.result.y = max(y + edge, bottom - GAP + ROUND if lane.sideways else 0.0)
        self.result.spans.append(Span(upper, bottom, -ROUND, x + lane.width))
