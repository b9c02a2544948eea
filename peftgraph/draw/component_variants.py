"""Texts of a component's box: sizes, heads, tooltip, as ranges where blocks that are drawn as one differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftgraph.draw.model_outline import Component, Sublayer


@dataclass(frozen=True)
class ComponentVariants:
    """The same component of all blocks that are drawn as one; they may differ in sizes."""

    components: tuple[Component, ...]

    @property
    def first(self) -> Component:
        """The component of the first block."""
        return self.components[0]

    @property
    def role(self) -> str:
        """Its role, in all blocks."""
        return self.first.role

    @property
    def sizes(self) -> str:
        """Output and input width, such as "14336 × 4096"."""
        shapes = [one.shape for one in self.components if one.shape]
        if not shapes:
            return ""
        return " × ".join(number_range([shape[axis] for shape in shapes]) for axis in range(len(shapes[0])))

    @property
    def head_counts(self) -> list[int]:
        """How many heads it serves, for each block where that is known."""
        return [one.heads for one in self.components if one.heads]

    @property
    def heads(self) -> str:
        """Heads and their width, such as "32 × 128"."""
        widths = [one.head_dim for one in self.components if one.head_dim]
        return f"{number_range(self.head_counts)} × {number_range(widths)}" if self.head_counts and widths else ""

    @property
    def experts(self) -> list[int]:
        """How many experts have one, for each block with experts."""
        return [one.experts for one in self.components if one.experts]

    @property
    def tip(self) -> str:
        """What the tooltip says."""
        return "\n".join(dict.fromkeys(map(_tip, self.components)))


def variants(alike: Sequence[Sublayer]) -> list[ComponentVariants]:
    """Return the components of sublayers with one skeleton, without biases."""
    kept = [[one for one in sublayer.components if one.role != "bias"] for sublayer in alike]
    return [ComponentVariants(tuple(column)) for column in zip(*kept, strict=True)]


def pick(found: Sequence[ComponentVariants], *roles: str) -> list[ComponentVariants]:
    """Return the components with some roles, in the order of the roles."""
    return [one for role in roles for one in found if one.role == role]


def norms(found: Sequence[ComponentVariants], *slots: str) -> list[ComponentVariants]:
    """Return the norms at some positions."""
    return [one for one in pick(found, "norm") if one.first.slot in slots]


def number_range(values: Sequence[int]) -> str:
    """Format numbers as one number, or as the range from the smallest to the largest.

    >>> number_range([32, 32]), number_range([40, 32, 56])
    ('32', '32–56')
    """
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _tip(component: Component) -> str:
    lines = [f"{component.role}  {component.path}".rstrip()]
    if component.shape:
        lines[0] += f"  {' × '.join(map(str, component.shape))}"
    if component.columns:
        lines.append(f"columns {component.columns} of a weight shared with {', '.join(component.fused)}")
    if component.bias:
        lines.append("with bias")
    if component.tied:
        lines.append(f"same tensor as {', '.join(component.tied)}")
    return "; ".join(lines)
