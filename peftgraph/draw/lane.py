"""The drawing of one insertion: its operations in layers, the signal's main way in the first column."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peftgraph.draw.algebra import Letters, Made
from peftgraph.draw.inserted import Insertion, Look, Read, Ref
from peftgraph.draw.shapes import Box, Circle, Point, Shape, wire

GAP, BESIDE = 15.0, 16.0  # between layers, between columns
TALL, PILL, ROUND = 38.0, 22.0, 16.0
TAPER = 9.0
LETTER = re.compile(r"[A-Za-z]\d?")


@dataclass
class Cell:
    """One operation, and where it stands."""

    look: Look | Literal["tap"]
    label: str
    detail: str = ""
    tip: str = ""
    taper: float = 0
    frozen: bool = False
    cells: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    layer: int = 0
    column: int = -1
    x: float = 0
    y: float = 0

    @property
    def round(self) -> bool:
        """Whether it is a circle."""
        return self.look in ("plus", "times")

    @property
    def width(self) -> float:
        """By its text."""
        if self.round or self.look == "tap":
            return ROUND
        text = max(7.1 * len(self.label), 5.9 * len(self.detail))
        return max(40.0 if self.look == "pill" else 62.0, text + (18 if self.look == "pill" else 20) + abs(self.taper))

    @property
    def height(self) -> float:
        """By its look."""
        if self.round or self.look == "tap":
            return ROUND if self.round else 0.0
        return TALL if self.detail else PILL

    @property
    def bottom(self) -> float:
        """Where it ends."""
        return self.y + self.height


@dataclass(frozen=True)
class Entry:
    """Where a wire from a value that is read ends, and whether with an arrow."""

    x: float
    y: float
    arrow: bool


@dataclass
class Lane:
    """A drawn insertion, its left side at x = 0.

    Attributes:
        shapes: without what leads to it and away.
        width: in pixels.
        entries: for each value that is read, where the wires from it end.
        out: where the result leaves: downwards, or to the left when nothing is read.
    """

    shapes: list[Shape]
    width: float
    top: float
    bottom: float
    entries: dict[Read, list[Entry]]
    out: Point
    sideways: bool


class Layout:
    """Cells with layers and columns.

    Args:
        insertion: what to draw.
        letters: for shapes.
        kind: the CSS class of its colour.
        strange: values that lie elsewhere, with the words that stand for them.
    """

    def __init__(self, insertion: Insertion, letters: Letters, kind: str, strange: Mapping[Read, str]) -> None:
        self.letters, self.kind, self.strange = letters, kind, strange
        self.application = insertion.application
        self.cells: list[Cell] = []
        for step in insertion.steps:
            detail = letters.shape(step.shape, insertion.application)
            self._define(*step.defines)
            wide = step.shape[-2:] if len(step.shape) == 2 else (1, 1)
            taper = TAPER * ((wide[0] < wide[1]) - (wide[0] > wide[1])) if step.look == "box" else 0
            self.cells.append(Cell(step.look, step.label, detail, step.tip, taper, step.frozen))
        self.out = self._place(insertion.out)
        for cell, step in zip(list(self.cells), insertion.steps, strict=False):
            for ref in step.inputs:
                self._feed(cell, ref, len(step.inputs) > 1)
        self._layer(self.out, 0)
        deepest = max(cell.layer for cell in self.cells)
        for cell in self.cells:
            cell.layer = deepest - cell.layer

    def _place(self, ref: Ref) -> int:
        """The number of the cell of a reference."""
        if isinstance(ref, int):
            return ref
        if isinstance(ref, Made):
            shape = self.letters.shape(ref.shape, self.application)
            self._define(ref.text, ref.formula)
            self.cells.append(Cell("made", ref.text, shape, "\n".join(ref.names), 0, ref.frozen))
        else:
            self.cells.append(Cell("again", self.strange.get(ref, ref.value), tip="a value from elsewhere"))
        return len(self.cells) - 1

    def _define(self, name: str, formula: str) -> None:
        if formula:
            self.letters.defined[name] = formula

    def _feed(self, cell: Cell, ref: Ref, among: bool) -> None:
        """Leads an input to a cell; a value that is read beside others comes down a way of its own."""
        if not isinstance(ref, Read) or ref in self.strange:
            cell.cells.append(self._place(ref))
        elif among:
            self.cells.append(Cell("tap", "", reads=[ref]))
            cell.cells.append(len(self.cells) - 1)
        else:
            cell.reads.append(ref)

    def _layer(self, number: int, layer: int) -> None:
        """Layers from the result upwards; turned around afterwards."""
        cell = self.cells[number]
        if layer > cell.layer or number == self.out:
            cell.layer = layer
        for one in cell.cells:
            self._layer(one, cell.layer + 1)

    # columns

    def columns(self, at: Mapping[Read, float]) -> None:
        """Gives every cell a column; ways that begin lower stand nearer to the line."""
        taken: list[list[tuple[int, int]]] = []
        self._column(self.out, 0, self.cells[self.out].layer, taken, at)

    def _column(
        self, number: int, column: int, until: int, taken: list[list[tuple[int, int]]], at: Mapping[Read, float]
    ) -> None:
        cell = self.cells[number]
        cell.column = column
        while len(taken) <= column:
            taken.append([])
        taken[column].append((cell.layer, until))
        waiting = sorted(cell.cells, key=lambda one: (-self._latest(one, at), self.cells[one].look == "tap"))
        straight = True
        for one in waiting:
            feeding = self.cells[one]
            if feeding.column >= 0:
                continue
            first, last = self._first(one), cell.layer - 1
            if straight and self._free(taken[column], first, last):
                self._column(one, column, last, taken, at)
            else:
                free = next(c for c in range(column + 1, 99) if c >= len(taken) or self._free(taken[c], first, last))
                self._column(one, free, last, taken, at)
            straight = False

    @staticmethod
    def _free(taken: list[tuple[int, int]], first: int, last: int) -> bool:
        return all(stop < first or start > last for start, stop in taken)

    def _first(self, number: int) -> int:
        """The uppermost layer that the main way to a cell takes up."""
        cell = self.cells[number]
        if cell.reads:
            return 0
        open_ = [one for one in cell.cells if self.cells[one].column < 0]
        if cell.cells and not open_:
            return min(self.cells[one].layer for one in cell.cells) + 1
        return self._first(open_[0]) if open_ else cell.layer

    def _latest(self, number: int, at: Mapping[Read, float]) -> float:
        cell = self.cells[number]
        return max([*(at[read] for read in cell.reads), *(self._latest(one, at) for one in cell.cells)], default=-1.0)

    # places

    def drawn(self, top: float, at: Mapping[Read, float]) -> Lane:
        """The lane, its first layer under `top`; `at` says how far down each value can be read first."""
        self.columns(at)
        self._heights(top, at)
        wide = [max(c.width for c in self.cells if c.column == i) for i in range(max(c.column for c in self.cells) + 1)]
        for cell in self.cells:
            cell.x = sum(wide[: cell.column]) + BESIDE * cell.column + wide[cell.column] / 2
        shapes: list[Shape] = []
        entries: dict[Read, list[Entry]] = {}
        for cell in self.cells:
            for one in cell.cells:
                shapes.append(self._edge(self.cells[one], cell))
            for read in cell.reads:
                entries.setdefault(read, []).append(Entry(cell.x, cell.y, cell.look != "tap"))
        shapes += [shape for cell in self.cells for shape in self._cell(cell)]
        last, lonely = self.cells[self.out], not entries and len(self.cells) == 1
        out = (last.x - last.width / 2, last.y + last.height / 2) if lonely else (last.x, last.bottom)
        bottom = max(cell.bottom for cell in self.cells)
        width = sum(wide) + BESIDE * (len(wide) - 1)
        return Lane(shapes, width, min(c.y for c in self.cells), bottom, entries, out, lonely)

    def _heights(self, top: float, at: Mapping[Read, float]) -> None:
        y = top + GAP
        for layer in range(max(cell.layer for cell in self.cells) + 1):
            here = [cell for cell in self.cells if cell.layer == layer]
            y = max([y, *(at[read] + GAP for cell in here for read in cell.reads)])
            height = max(cell.height for cell in here)
            for cell in here:
                cell.y = y + (height - cell.height if not cell.round else (height - cell.height) / 2)
            y += height + GAP

    def _edge(self, one: Cell, cell: Cell) -> Shape:
        kind = f"wire {self.kind}"
        if one.column == cell.column:
            return wire((one.x, one.bottom), (cell.x, cell.y), kind=kind)
        if cell.round:
            middle = cell.y + ROUND / 2
            side = cell.x + (ROUND / 2 if one.column > cell.column else -ROUND / 2)
            return wire((one.x, one.bottom), (one.x, middle), (side, middle), kind=kind)
        fans = one.layer + 1 < cell.layer or one.column < cell.column
        bar = one.bottom + GAP / 2 if fans else cell.y - GAP / 2
        return wire((one.x, one.bottom), (one.x, bar), (cell.x, bar), (cell.x, cell.y), kind=kind)

    def _cell(self, cell: Cell) -> list[Shape]:
        if cell.look == "tap":
            return []
        if cell.look == "plus" or cell.look == "times":
            return [Circle(cell.x, cell.y + ROUND / 2, cell.look, cell.tip, f"op {self.kind}")]
        kind = "again" if cell.look == "again" else f"inserted {self.kind}{' frozen' if cell.frozen else ''}"
        kind += " pill" if cell.look == "pill" else " letter" if LETTER.fullmatch(cell.label) else ""
        place = (cell.x - cell.width / 2, cell.y, cell.width, cell.height)
        return [
            Box(kind, *place, cell.label, cell.detail, cell.tip, PILL / 2 if cell.look == "pill" else 5, cell.taper)
        ]
