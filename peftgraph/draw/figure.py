"""The drawing of a whole model: stacks side by side, each distinct block once, between what stands before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peftgraph.draw.columns import GAP, NARROW, WIDTH, Column, Drawn, attention, drawn, feedforward, norms, other
from peftgraph.draw.parts import Block, Group, Outline, Part, Stack, Sublayer, skeleton
from peftgraph.draw.shapes import Box, Circle, Shape, Words, mirrored, moved, wire
from peftgraph.draw.svg import css_class, svg
from peftgraph.sites.explanations.listing import ranges

STREAM, LEFT, RIGHT = 44.0, 92.0, 26.0  # in a block: the stream, the columns' left side, what is right of them
BETWEEN, STACKS, MARGIN = 26.0, 76.0, 2.0  # between blocks, between stacks, around everything
HEADER = 34.0
ENDS = 32.0


@dataclass
class Canvas:
    """A stack that is being drawn from the top down, its stream on the left."""

    width: float
    y: float = 0.0
    shapes: list[Shape] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    written: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Kind:
    """The groups of a stack whose blocks have one skeleton."""

    groups: tuple[Group, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of all their layers."""
        return tuple(sorted(number for group in self.groups for number in group.layers))

    @property
    def title(self) -> str:
        """Such as "layers 0-79"."""
        return f"layer{'' if len(self.layers) == 1 else 's'} {ranges(self.layers).replace('-', '–')}"


def kinds(stack: Stack) -> list[Kind]:
    """The distinct blocks of a stack: layers that differ in sizes alone are one."""
    found: dict[Block, list[Group]] = {}
    for group in stack.groups:
        found.setdefault(skeleton(group.block), []).append(group)
    return [Kind(tuple(groups)) for groups in found.values()]


def figure(outline: Outline, standalone: bool = False) -> str:
    """The drawing as SVG; "" where no layers were found.

    Args:
        outline: the model.
        standalone: as a file of its own, with its style.
    """
    if not outline.stacks:
        return ""
    names = [stack.name for stack in outline.stacks]
    near = [(reader, memory) for reader, memory in outline.reads if names.index(reader) == names.index(memory) + 1]
    canvases = [_stack(stack) for stack in outline.stacks]
    height = max(canvas.y for canvas in canvases)
    x, shapes, right = MARGIN, list[Shape](), dict[str, float]()
    for stack, canvas in zip(outline.stacks, canvases, strict=True):
        memory = next((memory for reader, memory in near if reader == stack.name), None)
        flipped = mirrored(canvas.shapes, canvas.width) if memory is not None else canvas.shapes
        shapes += moved(flipped, x, MARGIN)
        if memory is not None:
            shapes += _memory(canvases[names.index(memory)], right[memory], x, canvas.reads)
        right[stack.name] = x + canvas.width
        x += canvas.width + STACKS
    width = x - STACKS + MARGIN
    return svg(shapes, width, height + 2 * MARGIN, f"the blocks of {outline.model}", standalone)


def _memory(source: Canvas, start: float, end: float, reads: Sequence[float]) -> list[Shape]:
    """From the end of a stack to every cross-attention that reads it, through the gap between the two."""
    lane = (start + end) / 2
    x, low = start - source.width + source.written[0], source.written[1] + MARGIN
    return [
        wire((x, low), (lane, low), (lane, y + MARGIN), (end + 1, y + MARGIN), kind="memory", arrow=False)
        for y in reads
    ]


def _stack(stack: Stack) -> Canvas:
    found = kinds(stack)
    most = max(len(step) for kind in found for step in _steps(kind.groups[0].block))
    canvas = Canvas(LEFT + most * WIDTH + (most - 1) * GAP + RIGHT)
    if stack.name:
        canvas.shapes.append(Words(0, 13, stack.name, "name"))
        canvas.y = 26.0
    shown = [part for part in stack.stem if part.role != "bias"]
    if not any(part.role == "embedding" for part in shown):
        canvas.shapes.append(Words(STREAM, canvas.y + 12, "input", "soft", "middle"))
        canvas.y += 18
        _stream(canvas, BETWEEN - 8)
    for part in shown:
        _end(canvas, part)
        _stream(canvas, GAP + 4 if part is not shown[-1] else BETWEEN)
    for place, kind in enumerate(found):
        _block(canvas, kind, f"k{min(place, 3)}" if len(found) > 1 else "")
        if kind is not found[-1]:
            _stream(canvas, BETWEEN)
    tail = [part for part in stack.tail if part.role != "bias"]
    for place, part in enumerate(tail):
        _stream(canvas, GAP + 4 if place else BETWEEN)
        _end(canvas, part)
        if part.role == "norm" or not place:
            canvas.written = canvas.width, canvas.y - (NARROW if part.role == "norm" else ENDS) / 2
    if not tail:
        _stream(canvas, BETWEEN, arrow=not stack.name)
        canvas.written = STREAM, canvas.y
    return canvas


def _stream(canvas: Canvas, by: float, arrow: bool = True) -> None:
    canvas.shapes.append(wire((STREAM, canvas.y), (STREAM, canvas.y + by), kind="stream", arrow=arrow))
    canvas.y += by


def _end(canvas: Canvas, part: Part) -> None:
    """What stands before or after the blocks, over the whole width."""
    height = NARROW if part.role == "norm" else ENDS
    one = Drawn((part,))
    kind = css_class(part.role)
    detail = one.sizes if part.role != "norm" else ""
    if part.tied:
        detail += ", tied"
    canvas.shapes.append(Box(kind, 0, canvas.y, canvas.width, height, part.role, detail, one.tip))
    canvas.y += height


def _steps(block: Block) -> list[list[tuple[int, str]]]:
    """The block as steps of its stream; a step is columns side by side, each a sublayer's number and its half.

    Half "dense" is what all values pass of a feed-forward, "routed" what the router chooses; "" is all of it.
    """
    steps: list[list[tuple[int, str]]] = []
    previous: Sublayer | None = None
    for place, one in enumerate(block.sublayers):
        downs = {part.experts is not None for part in one.of("ffn.down")}
        columns = [(place, "dense"), (place, "routed")] if len(downs) > 1 else [(place, "")]
        if previous is not None and previous.parallel and one.parallel:
            steps[-1] += columns
        else:
            steps.append(columns)
        previous = one
    return steps


def _block(canvas: Canvas, kind: Kind, mark: str) -> None:
    """A card: what repeats, how often, and which layers; `mark` is its shade in the strip of layers."""
    top, shapes = canvas.y, canvas.shapes
    canvas.shapes = []
    canvas.y += HEADER
    blocks = [group.block for group in kind.groups]
    canvas.shapes.append(wire((STREAM, top), (STREAM, canvas.y), kind="stream", arrow=False))
    for step in _steps(blocks[0]):
        _step(canvas, step, [block.sublayers for block in blocks])
    _stream(canvas, GAP, arrow=False)
    card = Box("card", 0, top, canvas.width, canvas.y - top, radius=10)
    times = Words(canvas.width - 18, top + 24, f"× {len(kind.layers)}", "times", "end")
    title = Words(canvas.width - 30 - 10 * len(times.text), top + 23, kind.title, "soft", "end")
    heading = [title, times, *([Box(f"mark {mark}", LEFT, top + 12, 20, 13, radius=2)] if mark else [])]
    canvas.shapes = [*shapes, card, *heading, *canvas.shapes]


def _step(canvas: Canvas, step: Sequence[tuple[int, str]], blocks: Sequence[tuple[Sublayer, ...]]) -> None:
    """One point of the stream to the next: the columns that leave it, and the plus where they come back."""
    top = canvas.y
    columns = [Column(LEFT + place * (WIDTH + GAP), top + 8) for place in range(len(step))]
    halves = [_half(drawn([block[place] for block in blocks]), half) for place, half in step]
    before = [norms(parts, "pre") for parts in halves]
    shared = len(step) > 1 and not all(before) and any(before)
    if shared:
        _shared_norm(canvas, columns, next(one for one in before if one))
    for column, (place, _), parts, own in zip(columns, step, halves, before, strict=True):
        one = blocks[0][place]
        if not shared:
            canvas.shapes.append(wire((STREAM, top + 8), (column.middle, top + 8), arrow=False))
            column.norm(own)
        _draw(column, parts, one)
    bottom = max(column.y for column in columns) + GAP
    for column in columns:
        back = [(column.middle, column.y), (column.middle, bottom), (STREAM + 8, bottom)]
        canvas.shapes += [*column.shapes, wire(*back)]
        if column.memory is not None:
            canvas.reads.append(column.memory)
            canvas.shapes.append(
                wire((canvas.width, column.memory), (column.x + WIDTH + 20, column.memory), kind="memory", arrow=False)
            )
    canvas.shapes.append(wire((STREAM, top), (STREAM, bottom - 8), kind="stream", arrow=False))
    canvas.shapes.append(Circle(STREAM, bottom, "plus", "the residual add"))
    canvas.y = bottom + 8
    for part in norms([part for parts in halves for part in parts], "post"):
        _stream(canvas, GAP)
        canvas.shapes.append(Box("norm", STREAM - 31, canvas.y, 62, NARROW, "norm", tip=part.tip))
        canvas.y += NARROW
    _stream(canvas, GAP, arrow=False)


def _half(parts: Sequence[Drawn], half: str) -> list[Drawn]:
    """The parts of a column; the routers of a split feed-forward go with what they weigh."""
    if not half:
        return list(parts)
    routed = half == "routed"
    experts = {part.experts for one in parts for part in one.parts if part.experts}
    return [
        one
        for one in parts
        if (
            (one.first.shape is not None and (one.first.shape[0] in experts) == routed)
            if one.first.role == "router"
            else (one.first.slot == "pre" and not routed) or (one.first.slot != "pre" and _is_routed(one) == routed)
        )
    ]


def _is_routed(one: Drawn) -> bool:
    return one.first.experts is not None or one.first.role == "norm"


def _shared_norm(canvas: Canvas, columns: Sequence[Column], norm: Sequence[Drawn]) -> None:
    """A norm that several columns read."""
    left, right = columns[0].x, columns[-1].x + WIDTH
    y = columns[0].y
    canvas.shapes.append(wire((STREAM, y), (columns[0].middle, y), (columns[0].middle, y + GAP)))
    canvas.shapes.append(Box("norm", left, y + GAP, right - left, NARROW, "norm", tip=norm[0].tip))
    for column in columns:
        column.y = y + GAP + NARROW


def _draw(column: Column, parts: Sequence[Drawn], one: Sublayer) -> None:
    if one.role == "attention":
        attention(column, parts, one)
    elif one.role == "ffn":
        feedforward(column, parts)
    else:
        other(column, parts)
