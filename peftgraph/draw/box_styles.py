"""Colours and texts of boxes: the colours of roles with sizes in numbers, or grey with sizes as letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from peftgraph.draw.component_variants import ComponentVariants
from peftgraph.draw.formulas import SizeSymbols
from peftgraph.draw.svg import css_class
from peftgraph.sites.roles import with_slot

INPUTS = with_slot(("input",))


class BoxStyle(Protocol):
    """The choices of a drawing.

    Attributes:
        memory: the CSS class of the wires that bring the memory of a cross-attention.
    """

    @property
    def memory(self) -> str: ...

    def css(self, role: str) -> str:
        """Return the CSS class of a role's boxes."""
        ...

    def detail(self, found: ComponentVariants) -> str:
        """Return the second text of a box."""
        ...

    def tip(self, found: ComponentVariants) -> str:
        """Return the tooltip of a box."""
        ...


@dataclass(frozen=True)
class RoleStyle:
    """The colours of roles; queries, keys and values with their heads, other projections with their widths."""

    memory: str = "memory"

    def css(self, role: str) -> str:
        """Return the CSS class of a role's boxes."""
        return "core" if role == "attention.core" else css_class(role)

    def detail(self, found: ComponentVariants) -> str:
        """Return heads and their width, or input and output width."""
        if found.role == "norm":
            return ""
        return found.heads if found.role in INPUTS else found.sizes

    def tip(self, found: ComponentVariants) -> str:
        """Return role, path and shape, with the outline's stars for layer numbers."""
        return found.tip


@dataclass(frozen=True)
class BaseStyle:
    """Grey boxes, behind what passes inserted.

    Attributes:
        symbols: the letters of sizes.
        layer: the number in paths.
    """

    symbols: SizeSymbols
    layer: int
    memory: str = "wire"

    def css(self, role: str) -> str:
        """Return the CSS class of a role's boxes."""
        return {"norm": "base norm", "attention.core": "base core"}.get(role, "base")

    def detail(self, found: ComponentVariants) -> str:
        """Return the shape of the weight, in letters where they are known."""
        shape = found.first.shape
        return self.symbols.shape(shape) if shape and found.role != "norm" else ""

    def tip(self, found: ComponentVariants) -> str:
        """Return role and path."""
        return f"{found.role}  {found.first.path}".replace("*", str(self.layer), 1).rstrip()
