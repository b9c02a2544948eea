"""The layout of a scene: each line from the top down, with what enters it in lanes beside it."""

from __future__ import annotations

from dataclasses import replace

from peftgraph.draw.element_layout import CORNER, FORK, GAP, LANE, ROUND, draw_element, place_columns
from peftgraph.draw.insertion_diagram import Lane
from peftgraph.draw.insertions import OuterValue
from peftgraph.draw.scene import (
    Arrival,
    Element,
    Experts,
    Gated,
    LabelledBox,
    Line,
    Nonlinearity,
    Note,
    ResidualBranch,
    SideBySide,
)
from peftgraph.draw.shape_group import Extent, ShapeGroup
from peftgraph.draw.shapes import Circle, Shape, moved, wire

BESIDE = 30.0  # between a stream and the columns beside it


def draw_line(line: Line, corner: float = 0.0, lead: float | None = None, side_lead: float = 0.0) -> ShapeGroup:
    """Draw a line with all its elements and branches.

    Args:
        line: a stream, or a branch of another line.
        corner: where its own wire starts; the wire that leads to it ends there.
        lead: the space before the first element; by default what the first forks need.
        side_lead: the least space before the first elements of parallel lines.
    """
    return _LineLayout(line, corner, _lead(line) if lead is None else lead, side_lead).draw()


def draw_stream(stream: Line) -> ShapeGroup:
    """Draw a residual stream; the first columns of its branches are centred on one x."""
    branches = [one for one in stream.elements if isinstance(one, ResidualBranch)]
    reach = max((-draw_line(one.lines[0], CORNER).left for one in branches), default=0.0)
    return _LineLayout(stream, 0.0, _lead(stream), 0.0, reach + BESIDE).draw()


def _lead(line: Line) -> float:
    """Return the space that the forks of a line's first station need."""
    return FORK if line.forks(0) else 0.0


class _LineLayout:
    """A line while it is drawn."""

    def __init__(self, line: Line, corner: float, lead: float, side_lead: float, centre: float = 0.0) -> None:
        self.line, self.lead, self.side_lead, self.centre = line, lead, side_lead, centre
        self.result = ShapeGroup()
        self.wired = corner  # where the line's own wire was last drawn to
        self.heights: dict[int, float] = {}
        self.entered = ""  # what last entered at this station

    def draw(self) -> ShapeGroup:
        """Draw station by station."""
        elements = self.line.elements
        for station in range(len(elements) + 1):
            self._station(station)
            if station < len(elements):
                self._element(elements[station])
        if self.line.arrow:
            self.result.height += GAP + 4
        self._wire(self.result.height, arrow=self.line.arrow)
        self.result.extents.append(Extent(0, self.result.height, -1, 1))
        return self.result

    def _wire(self, to: float, arrow: bool = True) -> None:
        if to > self.wired:
            self.result.shapes.insert(0, wire((0, self.wired), (0, to), css=self.line.css, arrow=arrow))
        self.wired = to

    def _element(self, element: Element) -> None:
        solid = isinstance(element, LabelledBox | Nonlinearity | Experts)
        words = isinstance(element, Note) and not element.dotted
        if solid or words or (isinstance(element, ResidualBranch) and self.result.height == self.wired):
            self.result.height += GAP
        if not words:
            self._wire(self.result.height, arrow=solid)
        group = draw_element(element, self._inner(element), self.centre)
        self.result.add(group, 0, self.result.height)
        self.result.height += group.height
        self.wired = self.result.height

    def _inner(self, element: Element) -> list[ShapeGroup]:
        """Return the inner lines of an element, drawn."""
        match element:
            case SideBySide():
                lead = max(self.side_lead, *map(_lead, element.lines))
                return [draw_line(line, CORNER, lead) for line in element.lines]
            case Gated():
                first = element.main.elements[0]
                beside = first.lines if isinstance(first, SideBySide) else []
                lead = max(map(_lead, [*beside, element.gate]))  # its box stands as high as those beside it
                return [draw_line(element.main, side_lead=lead), draw_line(element.gate, CORNER, lead)]
            case Experts():
                return [draw_line(element.line)]
            case ResidualBranch():
                return self._columns(element)
            case _:
                return []

    def _columns(self, branch: ResidualBranch) -> list[ShapeGroup]:
        """Draw the columns of a branch; an element before all of them is as wide as all of them together."""
        columns = [draw_line(line, CORNER) for line in branch.lines]
        if branch.head is None:
            return columns
        _, left, right = place_columns(columns, self.centre)
        boxes = [replace(one, width=right - left) for one in branch.head.elements if isinstance(one, LabelledBox)]
        return [*columns, draw_line(replace(branch.head, elements=list(boxes)), CORNER)]

    # what enters

    def _station(self, station: int) -> None:
        self.result.height += self.lead if station == 0 else FORK if self.line.forks(station) else 0.0
        self.heights[station] = self.result.height
        self.entered = ""
        for one in self.line.arrivals.get(station, ()):
            self._enter(one, station)

    def _enter(self, one: Arrival, station: int) -> None:
        """Draw an insertion: its forks, its lane, and where it enters."""
        read_at = {read: self._height(read, place, station) for read, place in one.stations.items()}
        top = min(read_at.values(), default=self.result.height - GAP / 2)
        lane = one.diagram.arrange(top, read_at)
        middle = lane.bottom - (lane.bottom - lane.top) / 2 if lane.sideways else lane.bottom + GAP - 2
        y = max(middle, self.result.height + GAP + ROUND)
        if lane.sideways:
            y = max(y, self.result.height + GAP + (lane.bottom - lane.top) / 2)
        self._lane(one, lane, read_at, y)

    def _height(self, read: OuterValue, place: int, station: int) -> float:
        """Return the height at which a wire to a read value leaves the line: below all insertions that it reads."""
        first = not self.line.arrivals.get(station) or not self.entered
        if place == station and (first or read.value == self.entered):
            return self.result.height + FORK
        return self.heights[place]

    def _lane(self, one: Arrival, lane: Lane, read_at: dict[OuterValue, float], y: float) -> None:
        shift = y - lane.out[1] if lane.sideways else 0.0
        top, bottom = lane.top + shift, max(lane.bottom + shift, y)
        upper, css, replaces = min([*read_at.values(), top]), f"wire {one.css}", one.insertion.sign == "replace"
        taken = [e.right for e in self.result.extents if e.bottom > upper - 3 and e.top < bottom + 3]
        x = max([ROUND, *taken]) + LANE
        trunks: list[Shape] = []
        for read, ends in lane.entries.items():
            start = read_at[read]
            for end in ends:
                to = (x + end.x, end.y + shift)
                trunks.append(wire((0, start), (to[0], start), to, css=css, arrow=end.arrow))
            trunks.append(Circle(0, start, "dot", css=f"dot {one.css}"))
        out = (x + lane.out[0], lane.out[1] + shift)
        edge = 0.0 if replaces else ROUND
        turn = [] if lane.sideways else [(out[0], y)]
        trunks.append(wire(out, *turn, (edge, y), css=css))
        # The line itself ends where its value was read last when the result replaces it.
        self._wire(max(read_at.values(), default=self.wired) if replaces else y - edge, arrow=False)
        self.result.shapes += [*trunks, *moved(lane.shapes, x, shift)]
        sign = "dot" if one.insertion.sign == "replace" else one.insertion.sign
        self.result.shapes.append(Circle(0, y, sign, "", f"{'dot' if replaces else 'op'} {one.css}"))
        self.wired, self.entered = y + edge, one.insertion.after
        self.result.height = max(y + edge, bottom - GAP + ROUND if lane.sideways else 0.0)
        self.result.extents.append(Extent(upper, bottom, -ROUND, x + lane.width))
