"""Says which value of an adapted graph stands where the folded graph has which one."""

from __future__ import annotations

from functools import cached_property

from peftgraph.folding.components import Component
from peftgraph.folding.engine import Folding
from peftgraph.folding.steps import WriteWindows
from peftgraph.ir.edits import Edit, EditLog


class ReplacedValues:
    """Compares the edits before a fold with those that it left.

    Args:
        folding: the run.
    """

    def __init__(self, folding: Folding) -> None:
        self._folding = folding
        self._log = EditLog(folding.program.edits)

    @cached_property
    def values(self) -> dict[str, str]:
        """The nodes of the folded graph at which edits entered, each with the adapted graph's node in its place.

        A scaled input of a projection has no such node: there, it is the projection's output.
        """
        found: dict[str, str] = {}
        readers: dict[str, None] = {}
        anchors = dict.fromkeys(move.anchor for edit in self._folding.program.edits for move in edit.moves)
        for anchor in anchors:
            moves = self._log.chain(anchor)
            while moves and self._is_left(self._log.owner(moves[-1])):
                moves.pop()
            owners = [self._log.owner(move) for move in moves]
            folded = [edit for edit in owners if not self._is_left(edit)]
            inner = [edit for edit in folded if self._folding.reads(edit)]
            if inner:
                readers |= dict.fromkeys(name for edit in inner for name in self._folding.readers(edit, anchor))
            elif folded:
                kept = [move.after for move, edit in zip(moves, owners, strict=True) if self._is_left(edit)]
                found[kept[-1] if kept else anchor.value] = moves[-1].after
        for name in readers:
            if not any(output in found for output in self._folding.outputs(name)):
                found[name] = name
        return found

    def is_at_weight(self, component: Component) -> bool:
        """Check whether every step of a component takes the place of stored tensors themselves."""
        return all(not isinstance(step, WriteWindows) or step.match.at_weight for step in component.steps)

    def _is_left(self, edit: Edit) -> bool:
        return edit in self._folding.edits
