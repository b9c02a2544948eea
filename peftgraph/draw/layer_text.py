"""The program's text of one layer of each kind, with the component that every line belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peftgraph.draw.model_outline import Component, LayerGroup, Outline
from peftgraph.ir.printer import print_program
from peftgraph.ir.program import ProgramData

LINE = re.compile(r"\s*%([^:]+): ")
MOST = 300  # lines of a layer


@dataclass(frozen=True)
class LayerText:
    """The lines of a layer.

    Attributes:
        title: such as "layer 0, as layers 0-79".
        lines: each with the key of its component, "" for the operations in between.
        left_out: how many more there are.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    left_out: int = 0


def layer_texts(program: ProgramData, outline: Outline) -> list[LayerText]:
    """Return the text of the first layer of each group of equal layers."""
    labelled = [(found[1], line.strip()) for line in print_program(program).splitlines() if (found := LINE.match(line))]
    texts: list[LayerText] = []
    for stack in outline.stacks:
        for group in stack.groups:
            first = group.layers[0]
            prefix = next(_prefixes(group, first), None)
            if prefix is None:
                continue
            keys = {id: part.key for part in group.block.components for id in part.ids}
            lines = [(keys.get(label, ""), line) for label, line in labelled if label.startswith(prefix)]
            like = f", as {group.title}" if len(group.layers) > 1 else ""
            title = f"{stack.name} layer {first}{like}".strip()
            texts.append(LayerText(title, tuple(lines[:MOST]), max(0, len(lines) - MOST)))
    return texts


def _prefixes(group: LayerGroup, layer: int) -> Iterator[str]:
    """Yield what the labels of a layer begin with, as its sites' ids say."""
    for part in group.block.components:
        yield from _of_layer(part, layer)


def _of_layer(part: Component, layer: int) -> Iterator[str]:
    for id in part.ids:
        found = re.match(rf"((?:[a-z_]+\.)?{layer}\.)", id)
        if found:
            yield found[1]
