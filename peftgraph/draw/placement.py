"""Where insertions belong on the lines of a block: the stations at which they enter, and at which they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from peftgraph.draw.inserted import Insertion, Read
from peftgraph.draw.items import BoxItem, Item, RowItem
from peftgraph.draw.lines import Line
from peftgraph.draw.operators import MOVES, operator
from peftgraph.ir.program import ProgramData

Place = tuple[Line, int]  # a line and one of its stations


class Placement:
    """The stations of one block, by the values that have their place there.

    Args:
        program: the rewritten program.
        layer: the number of the block.
        stream: its residual stream, with all lines that leave it.
        homes: the station behind each site.
        also: more values and their stations.
        cores: the stations behind attention cores.
    """

    def __init__(
        self,
        program: ProgramData,
        layer: int,
        stream: Line,
        homes: Mapping[str, Place],
        also: Mapping[str, Place],
        cores: Mapping[str, Place],
    ) -> None:
        self.layer, self.stream, self.homes, self.cores = layer, stream, homes, cores
        self.nodes = {node.name: node for node in (program.base or program).graph.nodes}
        self.order = {name: place for place, name in enumerate(self.nodes)}
        self.stands_for = {move.after: move.anchor.partition("@")[0] for edit in program.edits for move in edit.moves}
        self.owners: dict[str, list[Place]] = {}
        for line in stream.lines():
            for station, value in enumerate(line.values):
                if value:
                    self.owners.setdefault(value, []).append((line, station))
        self.last = max((self.order[value] for value in stream.values if value), default=len(self.nodes))
        for value, there in also.items():
            places = self.owners.setdefault(value, [there])
            if there[0] is stream and there not in places:
                places.insert(0, there)

    def insert(self, found: Sequence[Insertion]) -> None:
        """Puts insertions at the stations where they enter, inner ones first."""
        for one in sorted(found, key=lambda one: self.order.get(one.value, 0)):
            inside = self._inside(one)
            if inside is not None:
                inside.inside.append(one)
                inside.strange |= {read: self._words(read) for read in one.reads}
                continue
            place = self._entry(one)
            if place is None:
                continue  # it enters outside of what is drawn
            line, station = place
            line.arriving.setdefault(station, []).append(one)
            for read in one.reads:
                line.where[one.after, read] = self._read(read, line, station)

    def _upstream(self, value: str) -> list[tuple[Line, int]]:
        """The stations of the nearest values that a base value is made of, when that is one value."""
        todo, seen, found = [self.nodes[value]], set[fx.Node](), set[str]()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.order[node.name] > self.last and operator(node) not in MOVES:
                return []  # beyond the block
            if node.name in self.owners:
                found.add(node.name)
            else:
                todo += [one for one in node.all_input_nodes if _is_signal(one)]
        return list(self.owners[found.pop()]) if len(found) == 1 else []

    def _below(self, value: str) -> str:
        """The base value in whose place a value stands."""
        return self.stands_for.get(value, value)

    def _entry(self, one: Insertion) -> Place | None:
        there = self._stations(one.value)
        home = self.homes.get(one.site)
        if home is not None:
            same = [place for place in there if place[0] is home[0]]
            if same:
                return same[-1]
        if there:
            return there[0]  # the outermost line
        return home if one.owns else None

    def _stations(self, value: str) -> list[Place]:
        """The stations of a base value: behind what it is made of, or before what is made of it alone."""
        found = self._upstream(value)
        node = self.nodes[value]
        while not found and len(node.users) == 1 and operator(next(iter(node.users))) in MOVES:
            node = next(iter(node.users))
            found = self.owners.get(node.name, [])
        return found

    def _inside(self, one: Insertion) -> RowItem | None:
        """The row whose core an insertion enters, when it enters between its operands and its result."""
        if one.site not in self.cores or not one.reader or self._upstream(one.value):
            return None
        line, station = self.cores[one.site]
        item: Item = line.items[station - 1]
        return item if isinstance(item, RowItem) else None

    def _read(self, read: Read, line: Line, station: int) -> int | str:
        """The station of the line at which a value is read, or words for a value that lies elsewhere."""
        there = self._stations(self._below(read.value))
        here = [place for owner, place in there if owner is line and place <= station]
        return here[-1] if here else self._words(read)

    def _words(self, read: Read) -> str:
        for line, station in self._upstream(self._below(read.value)):
            item = line.items[station - 1] if station else None
            if isinstance(item, BoxItem):
                return item.label
        label = self.nodes[self._below(read.value)].meta.get("label", read.value)
        return label.removeprefix(f"{self.layer}.")


def _is_signal(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return node.op != "get_attr" and isinstance(first, Tensor) and first.dtype.is_floating_point
