"""Records what passes did to a graph: edits, the values that they replaced, and the order of edits on one value."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from peftgraph.ir.dtypes import short_dtype


@dataclass(frozen=True)
class Anchor:
    """The place where edits enter: a value of the base graph for all its readers, or the operand of one reader.

    Attributes:
        value: the node whose value it is.
        reader: the one node that reads the new value; None for all.
    """

    value: str
    reader: str | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes that it depends on."""
        return (self.value,) if self.reader is None else (self.value, self.reader)


@dataclass(frozen=True)
class Move:
    """Records that an edit redirected the users of a value to another one.

    Attributes:
        anchor: where the new value enters.
        level: the nesting of the edit there: 0 at a projection, 1 at a sublayer, 2 at a block.
        after: the node that carries the value from here on.
        uses: how many uses were moved.
    """

    anchor: Anchor
    level: int
    after: str
    uses: int


@dataclass(frozen=True)
class SizeIncrease:
    """Records that an edit increased a literal size in the arguments of a call.

    Attributes:
        node: the call.
        argument: the position of the argument.
        index: the position in it, where it is a list; else None.
        by: how much was added.
    """

    node: str
    argument: int
    index: int | None
    by: int


@dataclass(frozen=True)
class CachedRows:
    """Records that an edit keeps a value of its own in the cache: keys or values, of which earlier calls' rows are an
    input.

    Attributes:
        like: the model's own input whose rows of earlier calls it runs beside.
        input: the input that holds the earlier rows.
        output: the value with all rows, which is an output.
    """

    like: str
    input: str
    output: str


@dataclass(frozen=True)
class AddedInput:
    """Describes an input that is added to a model.

    Attributes:
        name: the keyword of calls, also of the graph's placeholder.
        dims: numbers, or names of sizes of the model's own inputs, such as "B".
        dtype: of its values.
        fill: the value of all its entries in a call that omits it; None: the call must give it.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype
    fill: float | None = None

    def __str__(self) -> str:
        default = "" if self.fill is None else f" = {self.fill}"
        return f"{self.name}: {short_dtype(self.dtype)}[{', '.join(map(str, self.dims))}]{default}"


@dataclass(frozen=True)
class Edit:
    """Records one rewrite at one site.

    Attributes:
        application: index into the program's history.
        rule: index of the rule in its pass.
        site: id of the site.
        moves: the values it replaced; none when it only makes parameters of the base trainable.
        nodes: every node it made, those of the delta first.
        parameters: the names of the parameters it made or made trainable.
        size_increases: the literal sizes that it increased.
        join_nodes: which of the nodes put the delta in its place.
        disabled_writes: the model's in-place writes that it disabled.
        installed: the parameters of the edit that replace stored tensors, by the name of the tensor.
        quantised: the stored tensors that codes took the place of, by name.
        narrowed: the calls of the model that the edit lets compute in another dtype.
        rewritten: the stored codes of an earlier edit that it gave other values, by name.
        cached: what it keeps in the cache, keys and values in turn.
        inputs: the inputs beside the model's own that it reads.
    """

    application: int
    rule: int
    site: str
    moves: tuple[Move, ...]
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    size_increases: tuple[SizeIncrease, ...] = ()
    join_nodes: frozenset[str] = frozenset()
    disabled_writes: tuple[str, ...] = ()
    installed: tuple[tuple[str, str], ...] = ()
    quantised: tuple[str, ...] = ()
    narrowed: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    cached: tuple[CachedRows, ...] = ()
    inputs: tuple[AddedInput, ...] = ()

    def pruned(self, names: Container[str]) -> Edit:
        """Return the edit restricted to nodes that still exist, after another edit was removed."""
        return replace(
            self,
            moves=tuple(one for one in self.moves if all(name in names for name in (*one.anchor.nodes, one.after))),
            nodes=tuple(name for name in self.nodes if name in names),
            size_increases=tuple(one for one in self.size_increases if one.node in names),
        )


class EditLog:
    """The edits of a graph that is being rewritten, in order of application, indexed by the values they replaced."""

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        self._edits: dict[int, Edit] = {}  # by identity: taking one out costs nothing
        self._moves: dict[Anchor, list[Move]] = {}
        self._anchors: dict[str, Anchor] = {}
        self._owners: dict[Move, Edit] = {}
        self._into: dict[str | None, dict[Move, Edit]] = {}
        for edit in edits:
            self.append(edit)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits.values())

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, edit: object) -> bool:
        return id(edit) in self._edits

    def append(self, edit: Edit) -> None:
        """Append an edit."""
        self._edits[id(edit)] = edit
        for move in edit.moves:
            self._moves.setdefault(move.anchor, []).append(move)
            self._anchors[move.after] = move.anchor
            self._owners[move] = edit
            self._into.setdefault(move.anchor.reader, {})[move] = edit

    def remove(self, edit: Edit) -> None:
        """Remove an edit."""
        del self._edits[id(edit)]
        for move in edit.moves:
            self._moves[move.anchor].remove(move)
            self._anchors.pop(move.after, None)
            del self._owners[move], self._into[move.anchor.reader][move]

    def owner(self, move: Move) -> Edit:
        """Return the edit that a move belongs to."""
        return self._owners[move]

    def moves_into(self, reader: str) -> Mapping[Move, Edit]:
        """Return the moves that redirected an operand of `reader` alone, each with its edit."""
        return self._into.get(reader, {})

    def moves_at(self, value: str) -> list[Move]:
        """Return the moves that redirected all readers of a value of the base, innermost first."""
        return self.chain(Anchor(value))

    def chain(self, anchor: Anchor) -> list[Move]:
        """Return the moves at `anchor`, innermost first: by level, then in order of application."""
        return sorted(self._moves.get(anchor, ()), key=lambda move: move.level)

    def predecessor(self, move: Move) -> str:
        """Return the value that a move replaced: the next inner one at the same anchor."""
        line = self.chain(move.anchor)
        position = line.index(move)
        return line[position - 1].after if position else move.anchor.value

    def value_after_removal(self, move: Move) -> str:
        """Return the value that users read once the edit of a move is removed, whatever was applied after it."""
        value = self.predecessor(move)
        own = self.owner(move)
        line = [one for one in self.moves_at(value) if self.owner(one) is not own] if move.anchor.reader else []
        return line[-1].after if line else value

    def base_value(self, name: str) -> str:
        """Return the base value that the value called `name` replaces; `name` itself if it replaces none."""
        anchor = self._anchors.get(name)
        return name if anchor is None else anchor.value


def competing_copies(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    """Return, by stored tensor, the edits of named adapters that each train a copy of it, of which the graph reads the
    last."""
    found: dict[str, list[Edit]] = {}
    for edit in edits:
        for name, _ in edit.installed:
            found.setdefault(name, []).append(edit)
    return {name: several for name, several in found.items() if len(several) > 1}
