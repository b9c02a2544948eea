"""What passes did to one block, as a drawing: the base in grey, what was inserted in colour where it enters."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from os import PathLike
from pathlib import Path

from peftgraph.draw.algebra import Letters
from peftgraph.draw.collect import outline
from peftgraph.draw.items import Colours, Drawn
from peftgraph.draw.parts import Outline
from peftgraph.draw.scene import Builder, Scene
from peftgraph.draw.shapes import Box, Shape, Words, moved
from peftgraph.draw.svg import style, svg
from peftgraph.errors import PeftGraphError
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Sites

MARGIN, HEADER, BETWEEN, LINE = 22.0, 36.0, 30.0, 21.0
PASSES = 5  # how many colours there are


class NothingToDraw(PeftGraphError):
    """A program has no block that could be drawn."""


class Picture:
    """A drawing as SVG; a notebook shows it by itself.

    Attributes:
        svg: the drawing as a file of its own.
    """

    def __init__(self, shapes: list[Shape], width: float, height: float, label: str) -> None:
        self.svg = svg(shapes, width, height, label, standalone=True) + "\n"
        self._inline = svg(shapes, width, height, label)

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the drawing as an SVG file and returns its path."""
        target = Path(path)
        if target.suffix != ".svg":
            raise PeftGraphError(f"A picture is saved as .svg, got {target.name!r}.")
        target.write_text(self.svg, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return f"<style>{style()}</style>{self._inline}"


class Diff(str):
    """The text of a difference; a notebook shows it below a picture of the first block that was changed."""

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
    """What turned `before` into `program`, in one block of each stack.

    Args:
        program: a rewritten program.
        sites: of its base.
        before: an earlier program, whose passes are not shown; the base by default.
        layer: the number of the block, -1 for the last; by default the first that was changed.
        stack: such as "decoder"; by default every stack that was changed.

    Raises:
        NothingToDraw: there is no such block.
    """
    known = () if before is None else before.history
    shown = [i for i, applied in enumerate(program.history) if i >= len(known) or applied != known[i]]
    kinds = {application: f"p{place % PASSES}" for place, application in enumerate(shown)}
    letters = Letters.of(sites, {i: program.history[i].method for i in shown})
    told = outline(program, sites)
    builder = Builder(program, sites, letters, kinds)
    changed = builder.changed()
    if before is not None and not shown:
        raise NothingToDraw("No pass was applied in between, so there is nothing to draw.")
    scenes: list[Scene] = []
    for one in told.stacks:
        if one.name == stack or (stack is None and (one.name in changed or not changed)):
            number = min(changed.get(one.name, [0])) if layer is None else layer
            scene = builder.scene(one, number if number >= 0 else one.depth + number)
            scenes += [] if scene is None else [scene]
    if not scenes:
        raise NothingToDraw(_no_block(told, layer, stack))
    colours = Colours(letters, kinds)
    for scene in scenes:
        scene.stream.align(colours)
    drawn = [(scene.title, scene.stream.draw(colours)) for scene in scenes]
    return _arranged(told.model, drawn, [(kinds[i], str(program.history[i].method)) for i in shown], letters)


def _no_block(told: Outline, layer: int | None, stack: str | None) -> str:
    wanted = " ".join(part for part in (stack or "", "block", "" if layer is None else str(layer)) if part)
    has = " and ".join(f"{one.name} {one.depth} blocks".strip() for one in told.stacks) or "no blocks that were found"
    return f"There is no {wanted} to draw; {told.model} has {has}."


def _arranged(model: str, drawn: list[tuple[str, Drawn]], legend: list[tuple[str, str]], letters: Letters) -> Picture:
    shapes: list[Shape] = []
    x, height = MARGIN, 0.0
    for title, one in drawn:
        left = min(one.left, -24.0)
        cards_width = max(one.right, 130.0) - left + 2 * MARGIN
        card = Box("card", x, MARGIN, cards_width, one.y + HEADER + 2 * 12, radius=10)
        shapes += [card, Words(x + cards_width - 16, MARGIN + 23, title, "soft", "end")]
        shapes += moved(one.shapes, x + MARGIN - left, MARGIN + HEADER)
        x += cards_width + BETWEEN
        height = max(height, card.height)
    width = x - BETWEEN + MARGIN
    y = MARGIN + height + 14
    rows: list[Shape] = []
    room = int((width - 2 * MARGIN - 24) / 6.9)
    for kind, text in legend:
        for place, line in enumerate(_wrapped(text, max(room, 30))):
            if not place:
                rows.append(Box(f"inserted {kind}", MARGIN + 2, y + 1, 12, 12, radius=3))
            rows.append(Words(MARGIN + 22, y + 11, line, "spec"))
            y += LINE - 3
        y += 3
    notes = [f"{name} = {formula}" for name, formula in letters.defined.items()]
    for note in [line for one in notes for line in _wrapped(one, max(room, 30))] + [letters.legend]:
        rows.append(Words(MARGIN + 22, y + 11, note, "detail"))
        y += LINE - 3
    back = Box("sheet", 0, 0, width, y + MARGIN - 10, radius=12)
    return Picture([back, *shapes, *rows], width, y + MARGIN - 10, escape(f"one block of {model}, rewritten"))


def _wrapped(text: str, room: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
