"""Draws what passes did to one block: the base in grey, insertions in colour where they enter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

from peftgraph.draw.block_scene import BlockSceneBuilder
from peftgraph.draw.box_styles import BaseStyle
from peftgraph.draw.collect_outline import outline
from peftgraph.draw.colours import Colours
from peftgraph.draw.component_variants import ComponentVariants
from peftgraph.draw.formulas import SizeSymbols
from peftgraph.draw.insertion_placement import InsertionPlacement
from peftgraph.draw.insertions import insertions
from peftgraph.draw.layout import draw_stream
from peftgraph.draw.model_figure import model_shapes
from peftgraph.draw.model_outline import BlockOutline, Component, Outline, StackOutline
from peftgraph.draw.picture_files import Picture
from peftgraph.draw.scene import Line, Note
from peftgraph.draw.shape_group import ShapeGroup
from peftgraph.draw.sheet import sheet
from peftgraph.draw.stations import BlockSites, Stations, mark_trained, names_of
from peftgraph.errors import PeftGraphError
from peftgraph.ir.edits import Edit
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Sites

EVERY = 10**6  # all projections without a role are shown: a pass may have changed any


class NothingToDraw(PeftGraphError):
    """A program has no block that could be drawn."""


class Diff(str):
    """The text of a difference; a notebook displays it below a picture of the first changed block."""

    def __new__(cls, text: str, draw: Callable[[], Picture]) -> Diff:
        made = super().__new__(cls, text)
        made._draw = draw
        return made

    _draw: Callable[[], Picture]

    def _repr_html_(self) -> str:
        lines = "".join(f"<span{_shade(line)}>{escape(line)}\n</span>" for line in self.splitlines())
        text = f"<details><summary>{escape(self.splitlines()[-1])}</summary><pre>{lines}</pre></details>"
        try:
            return self._draw()._repr_html_() + text
        except NothingToDraw:
            return text


def _shade(line: str) -> str:
    colours = {"+": "#2a9d6f", "-": "#d1495b"}
    colour = colours.get(line.lstrip()[:1], "")
    return f' style="color:{colour}"' if colour else ""


def picture(
    program: ProgramData,
    sites: Sites,
    before: ProgramData | None = None,
    layer: int | None = None,
    stack: str | None = None,
) -> Picture:
    """Draw the changes from `before` to `program` in one block of each stack.

    Args:
        program: a rewritten program.
        sites: of its base.
        before: an earlier program, whose passes are not shown; the base by default.
        layer: the number of the block, -1 for the last; by default the first that was changed.
        stack: such as "decoder"; by default every stack that was changed.

    Raises:
        NothingToDraw: there is no such block.
    """
    earlier = () if before is None else before.history
    shown = [i for i, applied in enumerate(program.history) if i >= len(earlier) or applied != earlier[i]]
    if before is not None and not shown:
        raise NothingToDraw("No pass was applied in between, so there is nothing to draw.")
    colours = Colours({i: program.history[i].method for i in shown})
    symbols = SizeSymbols.of(sites, {i: program.history[i].method for i in shown})
    model = outline(program, sites)
    rewritten = _Rewritten(program, sites, symbols, colours)
    changed = rewritten.changed()
    drawn: list[tuple[str, ShapeGroup]] = []
    for one in model.stacks:
        if one.name == stack or (stack is None and (one.name in changed or not changed)):
            number = min(changed.get(one.name, [0])) if layer is None else layer
            number = number if number >= 0 else one.depth + number
            block = one.block(number)
            if block is not None:
                title = f"{one.name} layer {number} of 0–{one.depth - 1}".strip()
                drawn.append((title, rewritten.drawing(one, number, block)))
    if not drawn:
        raise NothingToDraw(_no_block(model, layer, stack))
    words = " and ".join(dict.fromkeys(program.history[i].method.word for i in shown))
    title = f"{model.model} with {words}" if words else f"{model.model}, as it is"
    return sheet(title, _counts(program), drawn, colours, symbols)


def _counts(program: ProgramData) -> str:
    """Return how many values train, and how many the model has."""
    base = (program.base or program).table
    total = sum({id(one.tensor): one.tensor.numel() for one in base.values() if one.kind == "parameter"}.values())
    trained = sum({id(one): one.numel() for one in program.table.trainable.values()}.values())
    share = f", {trained / total:.2%} of the model's {total:,}" if total else ""
    return f"{trained:,} values train{share}" if trained else f"{total:,} values, none of which train"


def model_picture(model: Outline) -> Picture:
    """Draw a whole model as it is: each distinct block once.

    Raises:
        NothingToDraw: no blocks were found.
    """
    drawn = model_shapes(model)
    if drawn is None:
        raise NothingToDraw(f"There are no blocks to draw in {model.model}.")
    return Picture(*drawn, escape(f"the blocks of {model.model}"))


def _no_block(model: Outline, layer: int | None, stack: str | None) -> str:
    wanted = " ".join(word for word in (stack or "", "block", "" if layer is None else str(layer)) if word)
    has = " and ".join(f"{one.name} {one.depth} blocks".strip() for one in model.stacks) or "no blocks that were found"
    return f"There is no {wanted} to draw; {model.model} has {has}."


@dataclass(frozen=True)
class _Rewritten:
    """A rewritten program, with what its drawings need.

    Attributes:
        sites: of its base.
        symbols: for shapes.
        colours: of the passes that are shown.
    """

    program: ProgramData
    sites: Sites
    symbols: SizeSymbols
    colours: Colours

    def changed(self) -> dict[str, list[int]]:
        """Return, for every stack that the shown passes changed, the numbers of its changed layers."""
        found: dict[str, list[int]] = {}
        by_id = {site.id: site for site in self.sites}
        for edit in self.program.edits:
            site = by_id[edit.site]
            if edit.application in self.colours and site.layer is not None:
                found.setdefault(site.stack or "", []).append(site.layer)
        return found

    def drawing(self, stack: StackOutline, layer: int, block: BlockOutline) -> ShapeGroup:
        """Draw a block with everything that the shown passes did to it, and to the parts around the blocks."""
        sites = BlockSites(self.sites, stack.name, layer)
        edits = [edit for edit in self.program.edits if self._concerns(edit, stack, sites)]
        touched = {edit.site for edit in edits} | self._trained(edits)
        builder = BlockSceneBuilder(BaseStyle(self.symbols, layer), EVERY)

        def ends(components: Iterable[Component]) -> list[Component]:
            return [one for one in components if touched & set(one.ids)]

        stream = Line(css="stream", arrow=True)
        stem, tail, left = ends(stack.stem), ends(stack.tail), stack.depth - 1 - layer
        stream.elements += [builder.end(ComponentVariants((one,))) for one in stem]
        stream.elements += _omitted(layer) if stem else []
        entry = len(stream.elements)
        stream.elements += builder.block([block])
        stream.elements += _omitted(left) if tail else []
        stream.elements += [builder.end(ComponentVariants((one,))) for one in tail]
        base = self.program.base or self.program
        stations = Stations(base.graph, sites, stream, entry)
        for edit in edits:
            if not edit.moves:
                mark_trained(stations.boxes, edit.parameters, self.colours.of(edit.application, edit.rule))
        placement = InsertionPlacement(self.program, stations, self.symbols, self.colours)
        placement.insert(insertions(self.program, self.sites, edits))
        return draw_stream(stream)

    def _concerns(self, edit: Edit, stack: StackOutline, sites: BlockSites) -> bool:
        """Tell whether an edit belongs to a block or to the parts around the blocks of its stack."""
        site = sites.by_id[edit.site]
        if edit.application not in self.colours:
            return False
        if site.layer is None:
            ids = {id for component in (*stack.stem, *stack.tail) for id in component.ids}
            return site.id in ids or bool(self._trained([edit]) & ids)
        return site.layer == sites.layer and (site.stack or "") == stack.name

    def _trained(self, edits: Iterable[Edit]) -> set[str]:
        """Return the sites outside blocks whose own parameters some edits train."""
        names = {name for edit in edits if not edit.moves for name in edit.parameters}
        return {site.id for site in self.sites if site.layer is None and names & set(names_of(site))}


def _omitted(count: int) -> list[Note]:
    return [Note(f"{count} block{'s' if count > 1 else ''}", dotted=True)] if count > 0 else []
