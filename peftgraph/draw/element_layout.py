"""The layout of what stands on a line: each element as shapes around x = 0, made of the groups of its inner lines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from peftgraph.draw.scene import (
    Arrival,
    Element,
    Experts,
    Gated,
    LabelledBox,
    Nonlinearity,
    Note,
    ResidualBranch,
    SideBySide,
)
from peftgraph.draw.shape_group import Extent, ShapeGroup
from peftgraph.draw.shapes import Box, Circle, Shape, Words, moved, wire

GAP, LANE, ROUND, FORK = 15.0, 20.0, 8.0, 10.0
APART = 11.0  # between lines side by side
BETWEEN = 22.0  # between sublayers side by side
MARK = 16.0
CORNER = 7.0  # the wire that leads to a line ends as far behind its corner
PILE, FRAME = 6.0, 20.0  # by how much the experts at the back stand out, the room above what is inside


def draw_element(element: Element, inner: Sequence[ShapeGroup], centre: float) -> ShapeGroup:
    """Draw an element.

    Args:
        element: an element of a line.
        inner: its inner lines, drawn, in the order of `inner_lines`.
        centre: the least distance from a residual stream to the first line of a branch.
    """
    match element:
        case LabelledBox():
            return _box(element)
        case Nonlinearity():
            return ShapeGroup([Circle(0, ROUND, "bend", element.tip)], [Extent(0, 2 * ROUND, -ROUND, ROUND)], 2 * ROUND)
        case SideBySide():
            return _side_by_side(element, inner)
        case Gated():
            main, gate = inner
            return _weighed(element, main, gate) if element.enters == "result" else _routed(main, gate)
        case Experts():
            return _experts(element, inner[0])
        case ResidualBranch():
            return _branch(element, inner, centre)
        case Note():
            return _note(element)


def _box(one: LabelledBox, width: float = 0.0) -> ShapeGroup:
    """Draw a box in the middle, with its own width or a given one, and its marks on the right side."""
    width = width or one.width
    half, radius = width / 2, 0.0 if one.square else 5.0
    shapes: list[Shape] = [
        Box(one.css, -half, 0, width, one.height, one.label, one.detail, one.tip, radius, 0, one.key)
    ]
    x = half - MARK / 2
    for css, text in one.marks:
        y = (one.height - MARK) / 2
        shapes.append(Box(f"inserted mark-of {css}", x, y, MARK, MARK, text, "", f"{text} trains", 4))
        x += MARK + 3
    return ShapeGroup(shapes, [Extent(0, one.height, -half, max(half, x - 3) if one.marks else half)], one.height)


def _note(note: Note) -> ShapeGroup:
    """Draw a text: beside a dotted piece of the stream for omitted blocks, otherwise in the middle."""
    if not note.dotted:
        text = Words(0, 4, note.text, "detail", "middle")
        return ShapeGroup([text], [Extent(-8, 8, -3 * len(note.text), 3 * len(note.text))], 8.0)
    shapes: list[Shape] = [wire((0, -4), (0, 26), css="stream gap", arrow=False), Words(14, 16, note.text)]
    return ShapeGroup(shapes, [Extent(0, 22, -2, 14 + 6.4 * len(note.text))], 22.0)


# lines side by side


def _side_by_side(element: SideBySide, inner: Sequence[ShapeGroup]) -> ShapeGroup:
    """Draw parallel lines, the first with its lanes on the left and the others with theirs on the right, and where they
    join."""
    groups = [one.mirrored() if i == 0 and len(inner) > 1 else one for i, one in enumerate(inner)]
    widths = [_own_width(line.elements[0]) for line in element.lines]
    places = _places(groups, widths, element.fused)
    result, low = ShapeGroup(height=FORK), max(one.height for one in groups)
    edge = max(x + one.right for x, one in zip(places, groups, strict=True)) + 24
    left, right = places[0] - widths[0] / 2, places[-1] + widths[-1] / 2
    if element.fused and right - left > sum(widths) + APART / 2:  # boxes of one weight that do not all touch
        result.shapes.append(Box("base bridge", left, FORK + GAP, right - left, 42.0, radius=0))
    for i, (one, x) in enumerate(zip(groups, places, strict=True)):
        result.add(one, x, FORK)
        if i in element.remote:
            result.shapes.append(wire((edge, FORK), (x, FORK), (x, FORK + CORNER), css=element.remote_css, arrow=False))
            result.extents.append(Extent(FORK - 2, FORK + 2, x, edge))
        else:
            result.shapes.append(wire((0, 0), (0, FORK), (x, FORK), (x, FORK + CORNER), arrow=False))
        if one.height < low:
            result.shapes.append(wire((x, FORK + one.height), (x, FORK + low), arrow=False))
    if element.remote:
        result.memory.append((edge, FORK))
    result.height = FORK + low
    _meet(element, result, places, widths)
    return result


def _own_width(element: Element) -> float:
    return element.width if isinstance(element, LabelledBox) else 0.0


def _places(groups: Sequence[ShapeGroup], widths: Sequence[float], fused: bool) -> list[float]:
    """Return the x of each line, around 0; boxes of one weight touch unless something is between them."""
    places = [0.0]
    for (one, width), (other, next_width) in itertools.pairwise(zip(groups, widths, strict=True)):
        touching = fused and one.right <= width / 2 and other.left >= -next_width / 2
        places.append(places[-1] + one.right - other.left + (0 if touching else APART))
    middle = (places[0] - widths[0] / 2 + places[-1] + widths[-1] / 2) / 2
    return [x - middle for x in places]


def _meet(element: SideBySide, result: ShapeGroup, places: Sequence[float], widths: Sequence[float]) -> None:
    y = result.height
    if element.core is not None:
        result.shapes += [wire((x, y), (x, y + GAP)) for x in places]
        core = _box(element.core, places[-1] - places[0] + (widths[0] + widths[-1]) / 2)
        result.add(core, 0, y + GAP)
        result.height = y + GAP + core.height
        for one in element.inside:
            _enter_core(core, result, one)
    elif element.meeting == "join":
        for x in places:
            result.shapes.append(wire((x, y), (x, y + GAP), (0, y + GAP), arrow=False))
        result.extents.append(Extent(y, y + GAP, places[0], places[-1]))
        result.height = y + GAP
    else:
        middle = y + ROUND
        for x in places:
            edge = -ROUND if x < 0 else ROUND
            result.shapes.append(wire((x, y), (x, middle), (edge, middle)))
        result.shapes.append(Circle(0, middle, "times" if element.meeting == "times" else "bend", element.tip))
        result.extents.append(Extent(y, middle + ROUND, places[0], places[-1]))
        result.height = middle + ROUND


def _enter_core(core: ShapeGroup, result: ShapeGroup, arrival: Arrival) -> None:
    """Draw an insertion inside the core: a lane whose result enters from the right."""
    height = arrival.diagram.arrange(0, {}).bottom
    lane = arrival.diagram.arrange(result.height - core.height / 2 - GAP - height, {})
    x = max(one.right for one in result.extents if one.bottom > lane.top) + LANE
    y, edge = result.height - core.height / 2, core.right
    out = x + lane.out[0]
    result.shapes += moved(lane.shapes, x, 0)
    result.shapes.append(wire((out, lane.out[1]), (out, y), (edge, y), css=f"wire {arrival.css}"))
    result.extents.append(Extent(lane.top, y, edge, x + lane.width))


# gates and experts


def _weighed(element: Gated, main: ShapeGroup, gate: ShapeGroup) -> ShapeGroup:
    """Draw a gate on the right of the line; its value is multiplied with the result below."""
    result = ShapeGroup()
    result.add(main, 0, 0)
    x = main.right - gate.left + APART
    result.add(gate, x, FORK)
    result.shapes.append(wire((0, 0), (0, FORK), (x, FORK), (x, FORK + CORNER), arrow=False))
    y = max(main.height + GAP, FORK + gate.height) + ROUND
    result.shapes.append(wire((x, FORK + gate.height), (x, y), (ROUND, y), css=element.css))
    result.shapes.append(wire((0, main.height), (0, y - ROUND)))
    result.shapes.append(Circle(0, y, "times", element.tip))
    result.extents.append(Extent(0, y + ROUND, -ROUND, x))
    result.height = y + ROUND
    return result


def _routed(main: ShapeGroup, gate: ShapeGroup) -> ShapeGroup:
    """Draw a router on the left, with a dashed wire for its weights to the experts; the value itself passes on its
    right."""
    router, result = gate.mirrored(), ShapeGroup()
    x = min(-GAP - router.right, main.left - router.left)
    result.add(router, x, FORK)
    result.shapes.append(wire((0, 0), (0, FORK), (x, FORK), (x, FORK + CORNER), arrow=False))
    result.extents.append(Extent(0, FORK, x, 0))
    y = FORK + router.height
    result.shapes.append(wire((x, y), (x, y + GAP), css="choice"))
    result.shapes.append(wire((0, 0), (0, y), arrow=False))
    result.add(main, 0, y)
    result.height = y + main.height
    return result


def _experts(element: Experts, inner: ShapeGroup) -> ShapeGroup:
    """Draw a pile of frames around the line, the uppermost in front."""
    left, right, height = inner.left - 12, inner.right + 12, FRAME + inner.height + 12
    top, result = 2 * PILE, ShapeGroup()
    for shift in (2 * PILE, PILE, 0.0):
        result.shapes.append(Box("pile", left + shift, top - shift, right - left, height, radius=7))
    result.shapes.append(Words(right - 12, top + 15, element.label, "detail", "end"))
    result.shapes.append(wire((0, top + FRAME - GAP), (0, top + FRAME), arrow=False))
    result.add(inner, 0, top + FRAME)
    result.shapes.append(wire((0, top + FRAME + inner.height), (0, top + height), arrow=False))
    result.height = top + height
    result.extents.append(Extent(0, result.height, left, right + top))
    return result


# the residual stream


def place_columns(columns: Sequence[ShapeGroup], centre: float) -> tuple[list[float], float, float]:
    """Return the x of the columns beside a stream, and the left and right edges of all of them."""
    x, centres = 0.0, list[float]()
    for one in columns:
        centres.append(max(x - one.left, centre))
        x = centres[-1] + one.right + BETWEEN
    return centres, centres[0] + columns[0].left, x - BETWEEN


def _branch(element: ResidualBranch, inner: Sequence[ShapeGroup], centre: float) -> ShapeGroup:
    """Draw the columns to the right of the stream, and the add where they join it again."""
    columns, heads = inner[: len(element.lines)], inner[len(element.lines) :]
    centres, left, right = place_columns(columns, centre)
    result, top = ShapeGroup(), ROUND
    start = (left + right) / 2 if heads else 0.0
    for head in heads:
        result.add(head, start, ROUND)
        result.shapes.append(wire((0, ROUND), (start, ROUND), (start, ROUND + CORNER), arrow=False))
        top = ROUND + head.height
    at_box = element.head is not None and not element.head.arrivals.get(len(element.head.elements))
    for x, one in zip(centres, columns, strict=True):
        result.add(one, x, top)
        lead = [(x, top)] if at_box else [(start, top), (x, top)]
        result.shapes.append(wire(*lead, (x, top + CORNER), arrow=False))
    low = top + max(one.height for one in columns) + ROUND + GAP
    for x, one in zip(centres, columns, strict=True):
        result.shapes.append(wire((x, top + one.height), (x, low), (ROUND, low)))
    result.extents.append(Extent(0, low, -ROUND, max(centres)))
    result.shapes.append(wire((0, 0), (0, low - ROUND), css="stream", arrow=False))
    result.shapes.append(Circle(0, low, "plus", "the residual add"))
    result.height = low + ROUND
    return result
