"""A finished drawing, and the files that it is saved as: SVG with its own style, PDF and PNG by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from peftgraph.draw.shapes import Shape
from peftgraph.draw.svg import style, svg
from peftgraph.errors import PeftGraphError
from peftgraph.utils.atomic_files import atomic_file

SUFFIXES = (".svg", ".pdf", ".png")


class Picture:
    """A drawing; a notebook displays it automatically.

    Attributes:
        svg: the content of an SVG file.
    """

    def __init__(self, shapes: Sequence[Shape], width: float, height: float, label: str) -> None:
        self._shapes, self._width, self._height, self._label = shapes, width, height, label
        self.svg = svg(shapes, width, height, label, standalone=True) + "\n"
        self._inline = svg(shapes, width, height, label)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the drawing as a file of the format that the suffix names, and return its path.

        Raises:
            PeftGraphError: the suffix is none of .svg, .pdf and .png, or matplotlib, which draws the last two, is
                missing.
        """
        target = check_suffix(Path(path))
        with atomic_file(target) as temporary:
            if target.suffix == ".svg":
                temporary.write_text(self.svg, encoding="utf-8")
            else:
                from peftgraph.draw.paint import paint

                paint(self._shapes, self._width, self._height, temporary)
        return target

    def __repr__(self) -> str:
        return f"<Picture of {self._label}, {self._width:.0f} x {self._height:.0f}>"

    def _repr_html_(self) -> str:
        return f"<style>{style()}</style>{self._inline}"


def check_suffix(path: Path) -> Path:
    """Return the path of a picture.

    Raises:
        PeftGraphError: its format is not known, or what draws it is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise PeftGraphError(f"A picture is saved as {', '.join(SUFFIXES)}, got {path.name!r}.")
    if path.suffix != ".svg":
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            raise PeftGraphError(f'A {path.suffix} is drawn by matplotlib: pip install "peftgraph[pictures]".')
    return path
