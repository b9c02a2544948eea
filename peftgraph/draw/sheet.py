"""A picture as a whole: the title and the counts, blocks on cards side by side, and the legend below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from peftgraph.draw.colours import Colours
from peftgraph.draw.formulas import SizeSymbols
from peftgraph.draw.picture_files import Picture
from peftgraph.draw.shape_group import ShapeGroup
from peftgraph.draw.shapes import Box, Circle, Shape, Words, moved

MARGIN, TITLE, HEADER, BETWEEN, LINE = 22.0, 44.0, 36.0, 30.0, 18.0
LETTER = 6.9  # the width of one in the legend
MARKS = {  # CSS class of a box -> what it means
    "base": "grey: the model's own",
    "frozen": "dashed: does not train",
    "again": "dashed grey: the model's own, computed once more",
}
SIGNS = {"times": "× multiplies", "concat": "‖ puts rows before"}


def sheet(
    title: str, counts: str, drawn: Sequence[tuple[str, ShapeGroup]], colours: Colours, symbols: SizeSymbols
) -> Picture:
    """Arrange a picture.

    Args:
        title: such as "BertModel with lora".
        counts: a line below it.
        drawn: blocks, each with its own title.
        colours: of the passes.
        symbols: the letters that sizes were drawn by.
    """
    shapes: list[Shape] = []
    x, height, top = MARGIN, 0.0, MARGIN + TITLE
    for name, one in drawn:
        left = min(one.left, -24.0)
        card = Box("card", x, top, max(one.right, 130.0) - left + 2 * MARGIN, one.height + HEADER + 24, radius=10)
        shapes += [card, Words(x + card.width - 16, top + 23, name, "soft", "end")]
        shapes += moved(one.shapes, x + MARGIN - left, top + HEADER)
        words = [Words(edge, y - 6, "memory", "detail", "end") for edge, y in one.memory]
        shapes += moved(words, x + MARGIN - left, top + HEADER)
        x += card.width + BETWEEN
        height = max(height, card.height)
    width = max(x - BETWEEN + MARGIN, 2 * MARGIN + 8.4 * len(title), 2 * MARGIN + 6.4 * len(counts))
    marks = " · ".join(_marks(shapes))
    rows, bottom = _legend(colours, symbols, marks, top + height + 14, int((width - 2 * MARGIN - 24) / LETTER))
    head = [Words(MARGIN, MARGIN + 14, title, "title"), Words(MARGIN, MARGIN + 33, counts, "soft")]
    back = Box("sheet", 0, 0, width, bottom + MARGIN - 10, radius=12)
    return Picture([back, *head, *shapes, *rows], width, bottom + MARGIN - 10, escape(f"one block of {title}"))


def _marks(shapes: Sequence[Shape]) -> Iterator[str]:
    """Yield the meanings of what a drawing shows."""
    classes = {css for one in shapes if isinstance(one, Box) for css in one.css.split()}
    yield from (meaning for css, meaning in MARKS.items() if css in classes)
    signs = {one.sign for one in shapes if isinstance(one, Circle) and one.css != "op"}
    yield from (meaning for sign, meaning in SIGNS.items() if sign in signs)


def _legend(colours: Colours, symbols: SizeSymbols, marks: str, y: float, room: int) -> tuple[list[Shape], float]:
    """Draw the passes with their colours and the meanings of marks and letters; also return the y below them."""
    rows: list[Shape] = []
    for css, text in colours.legend():
        for place, line in enumerate(wrapped(text, max(room, 30))):
            if not place and css:
                rows.append(Box(f"inserted {css}", MARGIN + 2, y + 1, 12, 12, radius=3))
            rows.append(Words(MARGIN + 22 if css else MARGIN + 2, y + 11, line, "spec"))
            y += LINE
        y += 3
    definitions = [f"{name} = {formula}" for name, formula in symbols.defined.items()]
    sizes = f"sizes are out × in: {symbols.legend}" if symbols.legend else ""
    for note in filter(None, [*definitions, sizes, marks]):
        for line in wrapped(note, int(max(room, 30) * 1.2)):
            rows.append(Words(MARGIN + 22, y + 11, line, "detail"))
            y += LINE
    return rows, y


def wrapped(text: str, room: int) -> list[str]:
    """Break a text into lines of at most `room` letters, between words."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
