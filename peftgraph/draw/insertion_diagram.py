"""The diagram of one insertion: its operations in layers, the signal's main path in the first column."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from peftgraph.draw.formulas import ParameterFormula, SizeSymbols
from peftgraph.draw.insertions import Insertion, Look, Operand, Operation, OuterValue
from peftgraph.draw.shapes import Box, Circle, Point, Shape, wire

GAP, BESIDE = 15.0, 16.0  # between layers, between columns
TALL, PILL, ROUND = 38.0, 22.0, 16.0
LARGEST = 60  # operations of an insertion that are drawn one by one
TAPER = 9.0
LETTER = re.compile(r"[A-Za-z]\d?")


@dataclass
class Cell:
    """One operation of a diagram, and the layer in which it stands.

    Attributes:
        look: how it is drawn; "tap" is a value that is read beside others and comes down a column of its own.
        taper: by how much the sides of its box lean, as of `Box`.
        operands: the cells whose results it reads.
        reads: the values of the program around that it reads.
    """

    look: Look | Literal["tap"]
    label: str
    detail: str = ""
    tip: str = ""
    taper: float = 0
    frozen: bool = False
    operands: list[int] = field(default_factory=list)
    reads: list[OuterValue] = field(default_factory=list)
    layer: int = 0

    @property
    def round(self) -> bool:
        """Tells whether it is a circle."""
        return self.look in ("plus", "times")

    @property
    def width(self) -> float:
        """Its width, by its text."""
        if self.round or self.look == "tap":
            return ROUND
        text = max(7.1 * len(self.label), 5.9 * len(self.detail))
        return max(40.0 if self.look == "pill" else 62.0, text + (18 if self.look == "pill" else 20) + abs(self.taper))

    @property
    def height(self) -> float:
        """Its height, by its look."""
        if self.round or self.look == "tap":
            return ROUND if self.round else 0.0
        return TALL if self.detail else PILL


@dataclass(frozen=True)
class WireEnd:
    """The end of a wire from a value that is read, and whether it has an arrow."""

    x: float
    y: float
    arrow: bool


@dataclass
class Lane:
    """A diagram as shapes, its left side at x = 0.

    Attributes:
        shapes: without what leads to it and away.
        width: in pixels.
        entries: for each value that is read, the ends of the wires from it.
        out: the point at which the result leaves: downwards, or to the left when nothing is read.
    """

    shapes: list[Shape]
    width: float
    top: float
    bottom: float
    entries: dict[OuterValue, list[WireEnd]]
    out: Point
    sideways: bool


class Diagram:
    """The cells of an insertion, in layers.

    Args:
        insertion: what to draw.
        symbols: for shapes.
        css: the CSS class of its colour.
        elsewhere: values that are not on the line that it enters, with the words that stand for them.
    """

    def __init__(
        self, insertion: Insertion, symbols: SizeSymbols, css: str, elsewhere: Mapping[OuterValue, str]
    ) -> None:
        self.symbols, self.css, self.elsewhere = symbols, css, elsewhere
        insertion = _summarised(insertion)
        self.application = insertion.application
        self.cells: list[Cell] = []
        for one in insertion.operations:
            detail = symbols.shape(one.shape, insertion.application)
            self._define(*one.defines)
            sizes = one.shape[-2:] if len(one.shape) == 2 else (1, 1)
            taper = TAPER * ((sizes[0] < sizes[1]) - (sizes[0] > sizes[1])) if one.look == "box" else 0
            self.cells.append(Cell(one.look, one.label, detail, one.tip, taper, one.frozen))
        self.out = self._cell_of(insertion.out)
        for cell, one in zip(list(self.cells), insertion.operations, strict=False):
            for operand in one.inputs:
                self._connect(cell, operand, len(one.inputs) > 1)
        self._set_layers(self.out, 0)
        deepest = max(cell.layer for cell in self.cells)
        for cell in self.cells:
            cell.layer = deepest - cell.layer

    def arrange(self, top: float, read_at: Mapping[OuterValue, float]) -> Lane:
        """Return the diagram as shapes, with its first layer below `top`; `read_at` is the position of each value that
        is read."""
        return _Arrangement(self, top, read_at).lane()

    def _cell_of(self, operand: Operand) -> int:
        """Return the number of the cell of an operand."""
        if isinstance(operand, int):
            return operand
        if isinstance(operand, ParameterFormula):
            shape = self.symbols.shape(operand.shape, self.application)
            for name, formula in (*operand.inner, (operand.text, operand.formula)):
                self._define(name, formula)
            self.cells.append(Cell("made", operand.text, shape, "\n".join(operand.names), 0, operand.frozen))
        else:
            self.cells.append(Cell("again", self.elsewhere.get(operand, operand.value), tip="a value from elsewhere"))
        return len(self.cells) - 1

    def _define(self, name: str, formula: str) -> None:
        if formula:
            self.symbols.defined[name] = formula

    def _connect(self, cell: Cell, operand: Operand, among: bool) -> None:
        """Connect an operand to a cell; a value that is read along with others gets its own column."""
        if not isinstance(operand, OuterValue) or operand in self.elsewhere:
            cell.operands.append(self._cell_of(operand))
        elif among:
            self.cells.append(Cell("tap", "", reads=[operand]))
            cell.operands.append(len(self.cells) - 1)
        else:
            cell.reads.append(operand)

    def _set_layers(self, number: int, layer: int) -> None:
        """Assign layers from the result upwards; the constructor reverses their numbers."""
        cell = self.cells[number]
        if layer > cell.layer or number == self.out:
            cell.layer = layer
        for one in cell.operands:
            self._set_layers(one, cell.layer + 1)


def _summarised(insertion: Insertion) -> Insertion:
    """Return an insertion of so many operations that no diagram shows them, such as a whole network, as one box."""
    count = len(insertion.operations)
    if count <= LARGEST:
        return insertion
    inputs = (one for operation in insertion.operations for one in operation.inputs)
    read = tuple(dict.fromkeys(one for one in inputs if isinstance(one, OuterValue)))
    box = Operation("box", f"{count} operations", read, tip="program.text() lists them")
    return replace(insertion, operations=(box,), out=0)


class _Arrangement:
    """A diagram whose cells get columns and heights."""

    def __init__(self, diagram: Diagram, top: float, read_at: Mapping[OuterValue, float]) -> None:
        self.cells, self.out, self.css = diagram.cells, diagram.out, diagram.css
        self.read_at = read_at
        self.columns = [-1] * len(self.cells)
        self.taken: list[list[tuple[int, int]]] = []  # for each column, the ranges of layers that are taken
        self._set_column(self.out, 0, self.cells[self.out].layer)
        self.y = [0.0] * len(self.cells)
        self._set_heights(top)
        count = max(self.columns) + 1
        self.widths = [
            max(cell.width for cell, column in zip(self.cells, self.columns, strict=True) if column == one)
            for one in range(count)
        ]
        self.x = [sum(self.widths[:column]) + BESIDE * column + self.widths[column] / 2 for column in self.columns]

    def lane(self) -> Lane:
        """Return the shapes, and the positions where wires enter and leave."""
        shapes: list[Shape] = []
        entries: dict[OuterValue, list[WireEnd]] = {}
        for number, cell in enumerate(self.cells):
            shapes += [self._edge(one, number) for one in cell.operands]
            for read in cell.reads:
                entries.setdefault(read, []).append(WireEnd(self.x[number], self.y[number], cell.look != "tap"))
        shapes += [shape for number in range(len(self.cells)) for shape in self._cell(number)]
        last, lonely = self.cells[self.out], not entries and len(self.cells) == 1
        x, y = self.x[self.out], self.y[self.out]
        out = (x - last.width / 2, y + last.height / 2) if lonely else (x, y + last.height)
        bottom = max(self._bottom(number) for number in range(len(self.cells)))
        width = sum(self.widths) + BESIDE * (len(self.widths) - 1)
        return Lane(shapes, width, min(self.y), bottom, entries, out, lonely)

    def _bottom(self, number: int) -> float:
        return self.y[number] + self.cells[number].height

    # columns

    def _set_column(self, number: int, column: int, until: int) -> None:
        """Assign a cell and its operands to columns; values that are read further down are nearer to the line."""
        cell = self.cells[number]
        self.columns[number] = column
        while len(self.taken) <= column:
            self.taken.append([])
        self.taken[column].append((cell.layer, until))
        waiting = sorted(cell.operands, key=lambda one: (-self._lowest_read(one), self.cells[one].look == "tap"))
        straight = True
        for one in waiting:
            if self.columns[one] >= 0:
                continue
            first, last = self._first_layer(one), cell.layer - 1
            if straight and self._free(column, first, last):
                self._set_column(one, column, last)
            else:
                others = (c for c in range(column + 1, len(self.taken)) if self._free(c, first, last))
                self._set_column(one, next(others, len(self.taken)), last)
            straight = False

    def _free(self, column: int, first: int, last: int) -> bool:
        return all(stop < first or start > last for start, stop in self.taken[column])

    def _first_layer(self, number: int) -> int:
        """Return the uppermost layer that the main path to a cell occupies."""
        cell = self.cells[number]
        if cell.reads:
            return 0
        unplaced = [one for one in cell.operands if self.columns[one] < 0]
        if cell.operands and not unplaced:
            return min(self.cells[one].layer for one in cell.operands) + 1
        return self._first_layer(unplaced[0]) if unplaced else cell.layer

    def _lowest_read(self, number: int) -> float:
        cell = self.cells[number]
        direct = [self.read_at[read] for read in cell.reads]
        return max([*direct, *map(self._lowest_read, cell.operands)], default=-1.0)

    # heights

    def _set_heights(self, top: float) -> None:
        y = top + GAP
        for layer in range(max(cell.layer for cell in self.cells) + 1):
            here = [number for number, cell in enumerate(self.cells) if cell.layer == layer]
            y = max([y, *(self.read_at[read] + GAP for number in here for read in self.cells[number].reads)])
            height = max(self.cells[number].height for number in here)
            for number in here:
                free = height - self.cells[number].height
                self.y[number] = y + (free / 2 if self.cells[number].round else free)
            y += height + GAP

    # shapes

    def _edge(self, source: int, target: int) -> Shape:
        """Return the wire from one cell to another."""
        css, cell = f"wire {self.css}", self.cells[target]
        start, (x, y) = (self.x[source], self._bottom(source)), (self.x[target], self.y[target])
        if self.columns[source] == self.columns[target]:
            return wire(start, (x, y), css=css)
        if cell.round:
            middle = y + ROUND / 2
            side = x + (ROUND / 2 if self.columns[source] > self.columns[target] else -ROUND / 2)
            return wire(start, (start[0], middle), (side, middle), css=css)
        fans = self.cells[source].layer + 1 < cell.layer or self.columns[source] < self.columns[target]
        bar = start[1] + GAP / 2 if fans else y - GAP / 2
        return wire(start, (start[0], bar), (x, bar), (x, y), css=css)

    def _cell(self, number: int) -> list[Shape]:
        cell, x, y = self.cells[number], self.x[number], self.y[number]
        if cell.look == "tap":
            return []
        if cell.look == "plus" or cell.look == "times":
            return [Circle(x, y + ROUND / 2, cell.look, cell.tip, f"op {self.css}")]
        css = "again" if cell.look == "again" else f"inserted {self.css}{' frozen' if cell.frozen else ''}"
        css += " pill" if cell.look == "pill" else " letter" if LETTER.fullmatch(cell.label) else ""
        radius = PILL / 2 if cell.look == "pill" else 5
        place = (x - cell.width / 2, y, cell.width, cell.height)
        return [Box(css, *place, cell.label, cell.detail, cell.tip, radius, cell.taper)]
