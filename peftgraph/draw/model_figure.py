"""The drawing of a whole model: stacks side by side, each distinct block once, between what comes before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftgraph.draw.block_scene import BlockSceneBuilder
from peftgraph.draw.box_styles import RoleStyle
from peftgraph.draw.component_variants import ComponentVariants
from peftgraph.draw.layout import BESIDE, draw_stream
from peftgraph.draw.model_outline import BlockOutline, Component, LayerGroup, Outline, StackOutline, skeleton
from peftgraph.draw.scene import Line
from peftgraph.draw.shape_group import ShapeGroup
from peftgraph.draw.shapes import Box, Shape, Words, mirrored, moved, wire
from peftgraph.draw.svg import css_class, svg
from peftgraph.sites.explanations.listing import ranges

LEFT, RIGHT = 44.0, 26.0  # in a card: what is left of the stream, and right of the columns
GAP, BETWEEN, STACKS, MARGIN = 15.0, 26.0, 76.0, 2.0  # between boxes, blocks, stacks, and around everything
HEADER, FOOTER = 26.0, 15.0
ENDS, NORM = 32.0, 22.0  # heights of what comes before and after the blocks
MOST_UNKNOWN = 5


@dataclass(frozen=True)
class DistinctBlock:
    """The groups of a stack whose blocks have one skeleton."""

    groups: tuple[LayerGroup, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of all their layers."""
        return tuple(sorted(number for group in self.groups for number in group.layers))

    @property
    def title(self) -> str:
        """Such as "layers 0–79"."""
        return f"layer{'' if len(self.layers) == 1 else 's'} {ranges(self.layers).replace('-', '–')}"


def distinct_blocks(stack: StackOutline) -> list[DistinctBlock]:
    """Return the distinct blocks of a stack; layers that differ only in sizes are merged."""
    found: dict[BlockOutline, list[LayerGroup]] = {}
    for group in stack.groups:
        found.setdefault(skeleton(group.block), []).append(group)
    return [DistinctBlock(tuple(groups)) for groups in found.values()]


def model_figure(outline: Outline, standalone: bool = False) -> str:
    """Return the drawing as SVG; "" where no layers were found.

    Args:
        outline: the model.
        standalone: whether to make a file of its own, with its style.
    """
    drawn = model_shapes(outline)
    if drawn is None:
        return ""
    shapes, width, height = drawn
    return svg(shapes, width, height, f"the blocks of {outline.model}", standalone)


def model_shapes(outline: Outline) -> tuple[list[Shape], float, float] | None:
    """Return the drawing as shapes, with its width and its height; None where no layers were found."""
    if not outline.stacks:
        return None
    names = [stack.name for stack in outline.stacks]
    memories = {
        reader: memory for reader, memory in outline.reads if names.index(reader) == names.index(memory) + 1
    }  # of stacks that read the one on their left
    drawn = {stack.name: _StackDrawing(stack) for stack in outline.stacks}
    height = max(one.y for one in drawn.values())
    x, shapes, right = MARGIN, list[Shape](), dict[str, float]()
    for name, one in drawn.items():
        memory = memories.get(name)
        flipped = one.shapes if memory is None else mirrored(one.shapes, one.width)
        shapes += moved(flipped, x, MARGIN)
        if memory is not None:
            shapes += _memory(drawn[memory], right[memory], x, one.reads)
        right[name] = x + one.width
        x += one.width + STACKS
    width = x - STACKS + MARGIN
    return shapes, width, height + 2 * MARGIN


def _memory(source: _StackDrawing, start: float, end: float, reads: Sequence[float]) -> list[Shape]:
    """From the end of a stack to every cross-attention that reads it, through the gap between the two."""
    lane = (start + end) / 2
    x, low = start - source.width + source.written[0], source.written[1] + MARGIN
    return [
        wire((x, low), (lane, low), (lane, y + MARGIN), (end + 1, y + MARGIN), css="memory", arrow=False) for y in reads
    ]


class _StackDrawing:
    """A stack, drawn from the top down.

    Attributes:
        width: in pixels; `y` is the height.
        reads: the heights at which wires from another stack's memory come in on the right.
        written: the point at which the result of the stack leaves.
    """

    def __init__(self, stack: StackOutline) -> None:
        self.distinct = distinct_blocks(stack)
        blocks = [self._block(one) for one in self.distinct]
        self.width = LEFT + max(one.right for one in blocks) + RIGHT
        self.y = 0.0
        self.shapes: list[Shape] = []
        self.reads: list[float] = []
        self.written = (0.0, 0.0)
        if stack.name:
            self.shapes.append(Words(0, 13, stack.name, "name"))
            self.y = 26.0
        self._stem([one for one in stack.stem if one.role != "bias"])
        for place, (one, block) in enumerate(zip(self.distinct, blocks, strict=True)):
            self._card(one, block, f"k{min(place, 3)}" if len(blocks) > 1 else "")
            if place < len(blocks) - 1:
                self._stream(BETWEEN)
        self._tail([one for one in stack.tail if one.role != "bias"], named=bool(stack.name))

    @staticmethod
    def _block(distinct: DistinctBlock) -> ShapeGroup:
        builder = BlockSceneBuilder(RoleStyle(), MOST_UNKNOWN)
        return draw_stream(Line(builder.block([group.block for group in distinct.groups]), css="stream"))

    def _stem(self, shown: Sequence[Component]) -> None:
        if not any(one.role == "embedding" for one in shown):
            self.shapes.append(Words(LEFT, self.y + 12, "input", "soft", "middle"))
            self.y += 18
            self._stream(BETWEEN - 8)
        for one in shown:
            self._end(one)
            self._stream(GAP + 4 if one is not shown[-1] else BETWEEN)

    def _tail(self, shown: Sequence[Component], named: bool) -> None:
        for place, one in enumerate(shown):
            self._stream(GAP + 4 if place else BETWEEN)
            self._end(one)
            if one.role == "norm" or not place:
                self.written = self.width, self.y - (NORM if one.role == "norm" else ENDS) / 2
        if not shown:
            self._stream(BETWEEN, arrow=not named)
            self.written = LEFT, self.y

    def _stream(self, by: float, arrow: bool = True) -> None:
        self.shapes.append(wire((LEFT, self.y), (LEFT, self.y + by), css="stream", arrow=arrow))
        self.y += by

    def _end(self, one: Component) -> None:
        """Draw a part before or after the blocks, over the whole width."""
        found, norm = ComponentVariants((one,)), one.role == "norm"
        height = NORM if norm else ENDS
        detail = ("" if norm else found.sizes) + (", tied" if one.tied else "")
        self.shapes.append(
            Box(css_class(one.role), 0, self.y, self.width, height, one.role, detail, found.tip, key=one.key)
        )
        self.y += height

    def _card(self, distinct: DistinctBlock, block: ShapeGroup, mark: str) -> None:
        """Draw a block on a card that says how often it repeats and in which layers; `mark` is its shade in the strip
        of layers."""
        top = self.y
        times = Words(self.width - 18, top + 24, f"× {len(distinct.layers)}", "times", "end")
        title = Words(self.width - 30 - 10 * len(times.text), top + 23, distinct.title, "soft", "end")
        height = HEADER + block.height + FOOTER
        self.shapes += [Box("card", 0, top, self.width, height, radius=10), title, times]
        if mark:
            self.shapes.append(Box(f"mark {mark}", LEFT + BESIDE, top + 12, 20, 13, radius=2))
        self.shapes.append(wire((LEFT, top), (LEFT, top + HEADER), css="stream", arrow=False))
        self.shapes.append(wire((LEFT, top + height - FOOTER), (LEFT, top + height), css="stream", arrow=False))
        self.shapes += moved(block.shapes, LEFT, top + HEADER)
        for x, y in block.memory:
            self.reads.append(y + top + HEADER)
            ends = (self.width, y + top + HEADER), (x + LEFT, y + top + HEADER)
            self.shapes.append(wire(*ends, css="memory", arrow=False))
        self.y = top + height
