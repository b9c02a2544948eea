"""The drawing of one sublayer, a column beside the residual stream: attention, feed-forward, or what plays no role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peftgraph.draw.parts import Part, Sublayer
from peftgraph.draw.shapes import Box, Circle, Shape, Words, row, wire
from peftgraph.sites.roles import with_slot

WIDTH = 224.0
GAP = 15.0  # between what follows each other
NARROW, TALL, FLAT, SMALL = 22.0, 42.0, 30.0, 26.0  # heights of boxes
PILE = 6.0  # by how much the experts behind stand out


@dataclass(frozen=True)
class Drawn:
    """One part of every block that is drawn together: the same place, maybe other sizes."""

    parts: tuple[Part, ...]

    @property
    def first(self) -> Part:
        """The part of the first block."""
        return self.parts[0]

    @property
    def sizes(self) -> str:
        """Input and output width, such as "4096 → 14336"."""
        shapes = [part.shape for part in self.parts if part.shape]
        if not shapes:
            return ""
        return " → ".join(span([shape[axis] for shape in shapes]) for axis in range(len(shapes[0]) - 1, -1, -1))

    @property
    def heads(self) -> str:
        """Heads and their width, such as "32 × 128"."""
        heads = [part.heads for part in self.parts if part.heads]
        widths = [part.head_dim for part in self.parts if part.head_dim]
        return f"{span(heads)} × {span(widths)}" if heads and widths else ""

    @property
    def tip(self) -> str:
        """What the tooltip says."""
        return "\n".join(dict.fromkeys(_tip(part) for part in self.parts))


@dataclass
class Column:
    """A column that is being drawn from the top down; `y` is where it ends."""

    x: float
    y: float
    shapes: list[Shape] = field(default_factory=list)
    memory: float | None = None

    @property
    def middle(self) -> float:
        """Where wires enter and leave."""
        return self.x + WIDTH / 2

    def down(self, by: float = GAP, arrow: bool = True) -> None:
        """A wire downwards in the middle."""
        self.shapes.append(wire((self.middle, self.y), (self.middle, self.y + by), arrow=arrow))
        self.y += by

    def box(self, kind: str, height: float, label: str, detail: str = "", tip: str = "", width: float = WIDTH) -> None:
        """A box in the middle."""
        self.shapes.append(Box(kind, self.middle - width / 2, self.y, width, height, label, detail, tip))
        self.y += height

    def norm(self, parts: Sequence[Drawn]) -> None:
        """Norms, one under the other, each with a wire before it."""
        for part in parts:
            self.down()
            self.box("norm", NARROW, "norm", tip=part.tip)


def span(values: Sequence[int]) -> str:
    """One number, or the smallest and the largest."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def drawn(alike: Sequence[Sublayer]) -> list[Drawn]:
    """The parts of sublayers with one skeleton, side by side."""
    kept = [[part for part in one.parts if part.role != "bias"] for one in alike]
    return [Drawn(tuple(parts)) for parts in zip(*kept, strict=True)]


def pick(parts: Sequence[Drawn], *roles: str) -> list[Drawn]:
    """Those of some roles, in the order of the roles."""
    return [part for role in roles for part in parts if part.first.role == role]


def norms(parts: Sequence[Drawn], *slots: str) -> list[Drawn]:
    """The norms in some places."""
    return [part for part in pick(parts, "norm") if part.first.slot in slots]


def attention(column: Column, parts: Sequence[Drawn], one: Sublayer) -> None:
    """q, k and v into the core, and o."""
    inputs = pick(parts, *with_slot(("input",)))
    _latents(column, pick(parts, "attention.latent"), norms(parts, "latent"))
    if inputs:
        _operands(column, inputs, norms(parts, "q", "k", "v"), one)
    else:
        column.down()
    queries = pick(inputs, "attention.q")
    heads = span([part.heads for part in queries[0].parts if part.heads] or [0]) if queries else ""
    words = [f"{heads} heads" if heads not in ("", "0", "1") else "", one.mask]
    column.box("core", TALL, f"{one.kind}-attention".strip("-"), " · ".join(word for word in words if word))
    column.norm(norms(parts, "inner"))
    for part in pick(parts, "attention.o"):
        column.down()
        column.box("attention-o", FLAT, "o", part.sizes, part.tip)
    column.norm(norms(parts, "sandwich"))


def _latents(column: Column, latents: Sequence[Drawn], scaled: Sequence[Drawn]) -> None:
    """What q, k or v are made of when a narrow projection stands before theirs."""
    if not latents:
        return
    column.down()
    for part, (x, width) in zip(latents, row(column.x, WIDTH, len(latents), 11.0), strict=True):
        column.shapes.append(Box("attention-latent", x, column.y, width, TALL, "latent", part.sizes, part.tip))
    column.y += TALL
    column.norm(scaled[:1])


def _operands(column: Column, inputs: Sequence[Drawn], scaled: Sequence[Drawn], one: Sublayer) -> None:
    """The boxes of q, k and v in a row; a fused weight is one box in segments. Below them norms, then the core."""
    fused = all(part.first.fused for part in inputs) and len(inputs) > 1
    places = row(column.x, WIDTH, len(inputs), 0.0 if fused else 11.0)
    top, bar = column.y + 2 * GAP, column.y + GAP
    centres = [x + width / 2 for x, width in places]
    remote = [i for i, part in enumerate(inputs) if one.kind == "cross" and part.first.role != "attention.q"]
    for i, centre in enumerate(centres):
        if i in remote:
            column.memory = bar
            column.shapes.append(wire((column.x + WIDTH + 20, bar), (centre, bar), (centre, top), kind="memory"))
        elif not fused:
            start = (column.middle, column.y)
            column.shapes.append(wire(start, (column.middle, bar), (centre, bar), (centre, top)))
    if fused:
        column.shapes.append(wire((column.middle, column.y), (column.middle, top)))
    for part, (x, width) in zip(inputs, places, strict=True):
        kind, label = part.first.role.replace(".", "-"), part.first.role.rpartition(".")[2]
        column.shapes.append(Box(kind, x, top, width, TALL, label, part.heads, part.tip, 0.0 if fused else 5.0))
    bottom = top + TALL
    lower = bottom + (GAP + SMALL if scaled else 0.0) + GAP
    waiting = list(scaled)
    for part, centre, (_, width) in zip(inputs, centres, places, strict=True):
        letter = part.first.role.rpartition(".")[2]
        own = next((norm for norm in waiting if norm.first.slot == letter), None)
        if own is None:
            column.shapes.append(wire((centre, bottom), (centre, lower)))
            continue
        waiting.remove(own)
        column.shapes.append(wire((centre, bottom), (centre, bottom + GAP)))
        inner = min(width, 66.0)
        column.shapes.append(Box("norm", centre - inner / 2, bottom + GAP, inner, SMALL, "norm", tip=own.tip))
        column.shapes.append(wire((centre, bottom + GAP + SMALL), (centre, lower)))
    column.y = lower


def feedforward(column: Column, parts: Sequence[Drawn]) -> None:
    """gate and up, the nonlinearity, and down; experts are a pile, with the router that chooses beside the wire."""
    routers = pick(parts, "router")
    experts = [part.experts for drawn in parts for part in drawn.parts if part.experts]
    spoken = _router(column, routers[0], bool(experts)) if routers else None
    if experts:
        if not routers:
            column.down()
        column.y += 2 * PILE
    top = column.y
    inner = Column(column.x, column.y + (6 if experts else 0))
    _gated(inner, parts, bool(experts))
    if experts:
        height = inner.y - top + 12
        for shift in (2 * PILE, PILE, 0.0):
            column.shapes.append(Box("pile", column.x + shift, top - shift, WIDTH, height, radius=7))
        column.shapes.append(Words(column.x + WIDTH - 12, top + 16, f"{span(experts)} experts", "detail", "end"))
        inner.y = top + height
    column.shapes += inner.shapes
    column.y = inner.y
    if spoken is not None:
        _weighed(column, spoken)
    column.norm(norms(parts, "sandwich"))


def _router(column: Column, router: Drawn, chooses: bool) -> float | None:
    """The router on the left, the value itself on the right of it; what the router says is dashed.

    Returns:
        Where what it says leaves on its left, when it weighs a result; None when it `chooses` among experts.
    """
    width = 78.0
    left, bar = column.x, column.y + GAP
    middle, bottom = left + width / 2, bar + GAP + SMALL
    start = (column.middle, column.y)
    column.shapes.append(wire(start, (column.middle, bar), (middle, bar), (middle, bar + GAP)))
    column.shapes.append(Box("router", left, bar + GAP, width, SMALL, "router", tip=router.tip))
    if chooses:
        column.y = bottom + GAP + 3
        column.shapes.append(wire((middle, bottom), (middle, column.y), kind="choice"))
    else:
        column.y = bottom
    column.shapes.append(wire(start, (column.middle, column.y), arrow=chooses))
    return None if chooses else bar + GAP + SMALL / 2


def _weighed(column: Column, spoken: float) -> None:
    """The result times what a router says, which comes around on the left."""
    y = column.y + GAP + 8
    lane = column.x - 9
    around = [(column.x, spoken), (lane, spoken), (lane, y), (column.middle - 8, y)]
    column.shapes.append(wire(*around, kind="choice"))
    column.shapes.append(wire((column.middle, column.y), (column.middle, y - 8)))
    column.shapes.append(Circle(column.middle, y, "times", "the result, weighed by the router"))
    column.y = y + 8


def _gated(column: Column, parts: Sequence[Drawn], piled: bool) -> None:
    """gate and up side by side, their product, down."""
    wide = pick(parts, *with_slot(("gate", "wide")))
    width = WIDTH - (24 if piled else 0)
    x = column.x + (12 if piled else 0)
    middle = x + width / 2
    top = column.y + (GAP if len(wide) < 2 else 2 * GAP)
    sign = top + TALL + GAP
    for part, (left, each) in zip(wide, row(x, width, max(len(wide), 1), 11.0), strict=False):
        centre = left + each / 2
        fork = [(middle, column.y), (middle, column.y + GAP), (centre, column.y + GAP), (centre, top)]
        column.shapes.append(wire(*(fork if len(wide) > 1 else [fork[0], (middle, top)])))
        kind, label = part.first.role.replace(".", "-"), part.first.role.rpartition(".")[2]
        column.shapes.append(Box(kind, left, top, each, TALL, label, part.sizes, part.tip))
        if len(wide) > 1:
            edge = middle + (-8 if centre < middle else 8)
            column.shapes.append(wire((centre, top + TALL), (centre, sign), (edge, sign)))
        else:
            column.shapes.append(wire((centre, top + TALL), (centre, sign - 8), arrow=False))
    gated = bool(pick(wide, "ffn.gate"))
    hidden = "ffn.hidden: " + ("the gate's nonlinearity times up" if gated else "the nonlinearity of up")
    column.shapes.append(Circle(middle, sign, "times" if gated else "bend", hidden))
    column.y = sign + 8
    for part in [*norms(parts, "inner"), *pick(parts, "ffn.down")]:
        column.shapes.append(wire((middle, column.y), (middle, column.y + GAP)))
        norm = part.first.role == "norm"
        box = (x, column.y + GAP, width, NARROW if norm else FLAT)
        column.shapes.append(
            Box("norm", *box, "norm", tip=part.tip) if norm else Box("ffn-down", *box, "down", part.sizes, part.tip)
        )
        column.y += GAP + box[3]


def other(column: Column, parts: Sequence[Drawn], most: int = 5) -> None:
    """Projections that play no role, by the last word of their paths."""
    shown = [part for part in parts if part.first.role != "norm" or not part.first.slot]
    for part in shown[:most]:
        column.down()
        name = part.first.path.rpartition(".")[2] or part.first.role
        column.box(part.first.role.replace(".", "-"), FLAT, name, part.sizes, part.tip)
    if len(shown) > most:
        column.y += GAP
        column.shapes.append(Words(column.middle, column.y, f"and {len(shown) - most} more", "detail", "middle"))


def _tip(part: Part) -> str:
    lines = [f"{part.role}  {part.path}".rstrip()]
    if part.shape:
        lines[0] += f"  {' × '.join(map(str, part.shape))}"
    if part.columns:
        lines.append(f"columns {part.columns} of a weight shared with {', '.join(part.fused)}")
    if part.bias:
        lines.append("with bias")
    if part.tied:
        lines.append(f"same tensor as {', '.join(part.tied)}")
    return "; ".join(lines)
