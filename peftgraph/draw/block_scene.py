"""Builds the scene of a block from its outline. Here, and in the slots of roles, is known what stands where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftgraph.draw.box_styles import BoxStyle
from peftgraph.draw.component_variants import ComponentVariants, norms, number_range, pick, variants
from peftgraph.draw.model_outline import BlockOutline, Sublayer
from peftgraph.draw.scene import (
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
from peftgraph.sites.roles import with_slot

COLUMN = 224.0  # width of a sublayer
APART = 11.0  # between boxes side by side
NARROW, SMALL, FLAT, TALL = 22.0, 26.0, 30.0, 42.0  # heights of boxes
FRAME = 24.0  # by how much a pile of experts is wider than what is inside
SIDE, STREAM_NORM = 78.0, 62.0  # widths of boxes beside a line, and of norms on the stream or on one operand
LETTER, SMALL_LETTER, PADDING = 7.0, 6.0, 14.0  # of texts, to make room for them

LATENTS, OPERANDS, RESULT_GATES = with_slot(("latent",)), with_slot(("input",)), with_slot(("result gate",))
ROUTERS, GATES, WIDE = with_slot(("router",)), with_slot(("gate",)), with_slot(("gate", "wide"))
OUTPUTS = with_slot(("output",))


@dataclass(frozen=True)
class BlockSceneBuilder:
    """Builds the lines of a block.

    Attributes:
        style: how boxes are coloured and labelled.
        most_unknown: how many projections without a role are shown in a sublayer.
    """

    style: BoxStyle
    most_unknown: int

    def block(self, blocks: Sequence[BlockOutline]) -> list[Element]:
        """Return the elements on the residual stream of a block.

        Args:
            blocks: with one skeleton, drawn as one.
        """
        return [element for step in _steps(blocks[0]) for element in self._step(step, blocks)]

    def end(self, found: ComponentVariants, detail: str | None = None) -> LabelledBox:
        """Return the box of a component before or after the blocks."""
        return self._box(found, found.role, 150.0, detail=detail)

    def _step(self, step: Sequence[tuple[int, str]], blocks: Sequence[BlockOutline]) -> Iterable[Element]:
        """Yield the sublayers between two points of the stream, and the norms on the stream after them."""
        columns = [
            (blocks[0].sublayers[place], _part(variants([block.sublayers[place] for block in blocks]), part))
            for place, part in step
        ]
        before = [norms(found, "pre") for _, found in columns]
        shared = len(columns) > 1 and any(before) and not all(before)
        head = Line([self._norm(one) for found in before for one in found]) if shared else None
        lines: list[Line] = []
        for one, found in columns:
            line = Line([] if shared else [self._norm(norm) for norm in norms(found, "pre")])
            if one.role == "attention":
                line.elements += self._attention(found, one)
            elif one.role == "ffn":
                line.elements += self._feedforward(found)
            else:
                line.elements += self._unknown(found)
            line.elements += [self._norm(norm) for norm in norms(found, "sandwich")]
            lines.append(line)
        yield ResidualBranch(lines, [one for one, _ in columns], head)
        for _, found in columns:
            yield from (self._norm(norm, STREAM_NORM) for norm in norms(found, "post"))

    # boxes

    def _box(
        self,
        found: ComponentVariants,
        label: str = "",
        width: float = COLUMN,
        height: float = FLAT,
        detail: str | None = None,
    ) -> LabelledBox:
        label = label or found.role.rpartition(".")[2]
        detail = self.style.detail(found) if detail is None else detail
        if found.role == "norm":
            height, detail = min(height, NARROW), ""
        text = LETTER * len(label), SMALL_LETTER * len(detail)
        width = max(width, PADDING + (max(text) if height == TALL else sum(text)))
        css, tip = self.style.css(found.role), self.style.tip(found)
        return LabelledBox(found.role, label, detail, tip, css, width, height, components=found.components)

    def _norm(self, found: ComponentVariants, width: float = COLUMN) -> LabelledBox:
        return self._box(found, "norm", width, NARROW)

    # attention

    def _attention(self, found: Sequence[ComponentVariants], one: Sublayer) -> list[Element]:
        """Return the elements of an attention: q, k and v into the core, its gate, and o."""
        elements = self._latents(found)
        operands = pick(found, *OPERANDS)
        counts = [number for q in pick(operands, "attention.q") for number in q.head_counts]
        heads = f"{number_range(counts)} heads" if counts and max(counts) > 1 else ""
        label, detail = f"{one.kind}-attention".strip("-"), " · ".join(word for word in (heads, one.mask) if word)
        core = LabelledBox("attention.core", label, detail, "", self.style.css("attention.core"), COLUMN, TALL)
        inner: list[Element] = [core]
        if operands:
            remote = tuple(i for i, q in enumerate(operands) if one.kind == "cross" and q.role != "attention.q")
            fused = len(operands) > 1 and all(q.first.fused for q in operands)
            lines = self._operands(operands, norms(found, "q", "k", "v"), fused)
            inner = [SideBySide(lines, "core", core, remote, self.style.memory, fused)]
        inner += [self._norm(norm) for norm in norms(found, "inner")]
        for gate in pick(found, *RESULT_GATES):
            box = self._box(gate, width=SIDE, height=TALL)
            inner = [Gated(Line(inner), Line([box]), tip=f"{gate.role}: weighs the result of the attention")]
        return [*elements, *inner, *(self._box(o) for o in pick(found, "attention.o"))]

    def _latents(self, found: Sequence[ComponentVariants]) -> list[Element]:
        """Narrow projections before those of q, k or v, side by side; each with the norm that follows it."""
        latents = pick(found, *LATENTS)
        lines: list[Line] = []
        for one in found:
            if one in latents:
                lines.append(Line([self._box(one, width=_share(len(latents)), height=TALL)]))
            elif lines and one in norms(found, "latent"):
                lines[-1].elements.append(self._norm(one, _share(len(latents))))
        return [SideBySide(lines, "join")] if len(lines) > 1 else [*(lines[0].elements if lines else [])]

    def _operands(
        self, operands: Sequence[ComponentVariants], scaled: Sequence[ComponentVariants], fused: bool
    ) -> list[Line]:
        """Return the lines of q, k and v, each with its own norms; a fused weight is one box in segments."""
        width = COLUMN / len(operands) if fused else _share(len(operands))
        lines: list[Line] = []
        for one in operands:
            own = [norm for norm in scaled if norm.first.slot == one.role.rpartition(".")[2]]
            box = self._box(one, width=width, height=TALL)
            box.square = fused
            lines.append(Line([box, *(self._norm(norm, min(width, STREAM_NORM)) for norm in own)]))
        return lines

    # feed-forward

    def _feedforward(self, found: Sequence[ComponentVariants]) -> list[Element]:
        """Return the elements of a feed-forward: gate and up, the nonlinearity, and down; experts are drawn as a pile,
        with their router before or beside them."""
        experts = [number for one in found for number in one.experts]
        elements = self._hidden(found, COLUMN - FRAME if experts else COLUMN)
        if experts:
            elements = list[Element]([Experts(Line(elements), f"{number_range(experts)} experts")])
        for router in pick(found, *ROUTERS)[:1]:
            gate = Line([self._box(router, width=SIDE, height=SMALL, detail="")])
            enters = "experts" if experts else "result"
            tip = "the result, weighed by the router"
            elements = list[Element]([Gated(Line(elements), gate, enters, "choice", tip)])
        return elements

    def _hidden(self, found: Sequence[ComponentVariants], width: float) -> list[Element]:
        wide = pick(found, *WIDE)
        gated = bool(pick(wide, *GATES))
        tip = "ffn.hidden: " + ("the gate's nonlinearity times up" if gated else "the nonlinearity of up")
        elements: list[Element] = []
        if len(wide) > 1:
            lines = [Line([self._box(one, width=_share(len(wide), width), height=TALL)]) for one in wide]
            elements.append(SideBySide(lines, "times" if gated else "bend", tip=tip))
        else:
            elements += [*(self._box(one, width=width, height=TALL) for one in wide), Nonlinearity(tip)]
        elements += [self._norm(norm, width) for norm in norms(found, "inner")]
        return elements + [self._box(down, width=width) for down in pick(found, "ffn.down")]

    # no role

    def _unknown(self, found: Sequence[ComponentVariants]) -> list[Element]:
        """Return projections without a known role, named by the last part of their paths."""
        shown = [one for one in found if one.role != "norm" or not one.first.slot]
        elements: list[Element] = [
            self._norm(one) if one.role == "norm" else self._box(one, one.first.path.rpartition(".")[2] or one.role)
            for one in shown[: self.most_unknown]
        ]
        left = len(shown) - self.most_unknown
        return elements + ([Note(f"and {left} more")] if left > 0 else [])


def _share(count: int, width: float = COLUMN) -> float:
    """Return the width of each of several boxes side by side."""
    return (width - APART * (count - 1)) / count


def _steps(block: BlockOutline) -> list[list[tuple[int, str]]]:
    """Return the block as steps along its residual stream; a step is a list of parallel columns, each the number of a
    sublayer and one of its parts.

    Part "dense" is the part of a feed-forward that all values pass through, "routed" the part that the router selects;
    "" is all of it.
    """
    steps: list[list[tuple[int, str]]] = []
    previous: Sublayer | None = None
    for place, one in enumerate(block.sublayers):
        downs = {component.experts is not None for component in one.of("ffn.down")}
        columns = [(place, "dense"), (place, "routed")] if len(downs) > 1 else [(place, "")]
        if previous is not None and previous.parallel and one.parallel:
            steps[-1] += columns
        else:
            steps.append(columns)
        previous = one
    return steps


def _part(found: Sequence[ComponentVariants], part: str) -> list[ComponentVariants]:
    """Return the components of a column; the routers of a feed-forward with a dense part belong to the column that they
    weight."""
    if not part:
        return list(found)
    experts = {number for one in found for number in one.experts}

    def routed(one: ComponentVariants) -> bool:
        if one.role == "router":
            return one.first.shape is not None and one.first.shape[0] in experts
        if one.role == "norm":
            return one.first.slot != "pre"
        return one.first.experts is not None

    return [one for one in found if routed(one) == (part == "routed")]
