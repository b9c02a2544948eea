"""Finds the value of the graph that each station of a block's lines carries, and the station after each site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, fx

from peftgraph.draw.graph_operators import MOVES, operator
from peftgraph.draw.model_outline import Component, Sublayer
from peftgraph.draw.scene import (
    Element,
    Experts,
    Gated,
    LabelledBox,
    Line,
    Nonlinearity,
    ResidualBranch,
    SideBySide,
    inner_lines,
)
from peftgraph.sites import Site, Sites

Station = tuple[Line, int]


class BlockSites:
    """The sites of one block, and of what comes before and after the blocks.

    Args:
        sites: of the base.
        stack: the name of the stack, "" where there is one.
        layer: the number of the block.
    """

    def __init__(self, sites: Sites, stack: str, layer: int) -> None:
        self.layer = layer
        self.by_id = {site.id: site for site in sites}
        self.members = [site for site in sites if site.layer == layer and (site.stack or "") == stack]

    def of(self, one: Component | Sublayer) -> Site | None:
        """Return the site of a component or a sublayer in this block, or outside the blocks."""
        found = [self.by_id[id] for id in one.ids if self.by_id[id].layer in (self.layer, None)]
        return found[0] if found else None

    def with_role(self, role: str) -> Iterator[Site]:
        """Yield the sites of a role."""
        return (site for site in self.members if site.role == role)

    def entry(self) -> str:
        """Return the value that enters the block; "" if it is unknown."""
        return next((site.ports["input"] for site in self.with_role("block")), "")


class Stations:
    """The stations of one block, by the values that they carry.

    Args:
        graph: of the base.
        sites: of the block.
        stream: its residual stream, with all lines that leave it.
        entry: the station of the stream at which the block starts.

    Attributes:
        results: site id -> the station after the site.
        cores: site id of an attention's core -> the station after it.
        boxes: the boxes of the stream and of all lines, with their sites.
    """

    def __init__(self, graph: fx.Graph, sites: BlockSites, stream: Line, entry: int) -> None:
        self.nodes = {node.name: node for node in graph.nodes}
        self.order = {name: place for place, name in enumerate(self.nodes)}
        self.sites, self.stream = sites, stream
        self.results: dict[str, Station] = {}
        self.cores: dict[str, Station] = {}
        self.boxes: list[tuple[LabelledBox, Site]] = []
        self.owners: dict[str, list[Station]] = {}
        self.also: list[tuple[str, Station]] = [(sites.entry(), (stream, entry))]
        self._line(stream, "" if entry else sites.entry(), None)
        carried = [value for value, there in self.owners.items() if any(line is stream for line, _ in there)]
        self.last = max((self.order[value] for value in carried), default=len(self.nodes))
        for value, there in self.also:
            known = self.owners.setdefault(value, [there]) if value else [there]
            if there[0] is stream and there not in known:
                known.insert(0, there)

    def of(self, value: str) -> list[Station]:
        """Return the stations of a base value: after the parts that compute it, or before the parts computed from it
        alone."""
        found = self.upstream(value)
        reader = _only_reader(self.nodes[value])
        while not found and reader is not None and operator(reader) in MOVES:
            found = self.owners.get(reader.name, [])
            reader = _only_reader(reader)
        return found

    def upstream(self, value: str) -> list[Station]:
        """Return the stations of the nearest value that a base value is computed from, if it is only one."""
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

    # which value a station carries

    def _line(self, line: Line, start: str, sublayer: Sublayer | None) -> None:
        """Record the values of a line, then those of its branches."""
        values = [start]
        self._own(start, (line, 0))
        for place, element in enumerate(line.elements, 1):
            values.append(self._result(element, (line, place), sublayer))
            self._own(values[-1], (line, place))
        for place, element in enumerate(line.elements):
            before = next((value for value in reversed(values[: place + 1]) if value), "")
            for i, inner in enumerate(inner_lines(element)):
                self._inner(element, i, inner, before, sublayer)

    def _own(self, value: str, station: Station) -> None:
        if value:
            self.owners.setdefault(value, []).append(station)

    def _inner(self, element: Element, i: int, line: Line, before: str, sublayer: Sublayer | None) -> None:
        """Record the values of a line that branches off at an element."""
        if isinstance(element, ResidualBranch) and i < len(element.lines):
            sublayer = element.sublayers[i]
            if element.head is not None:
                before = self._result(element.head.elements[-1], (element.head, len(element.head.elements)), None)
            site = self.sites.of(sublayer)
            if site is not None:
                self.results[site.id] = (line, len(line.elements))
        starts_anew = isinstance(element, SideBySide) or (isinstance(element, Gated) and line is element.gate)
        self._line(line, self._read(line) or before if starts_anew else before, sublayer)
        if isinstance(element, SideBySide) and element.core is not None:
            core = self._core(sublayer)
            operand = line.elements[0]
            if core is not None and isinstance(operand, LabelledBox):
                port = operand.role.rpartition(".")[2]
                self.also.append((core.ports.get(port, ""), (line, len(line.elements))))

    def _read(self, line: Line) -> str:
        """Return the value that the first box of a line reads."""
        site = self._site(line.elements[0])
        return site.ports.get("input", "") if site is not None else ""

    def _site(self, element: Element) -> Site | None:
        return self.sites.of(element.components[0]) if isinstance(element, LabelledBox) and element.components else None

    def _core(self, sublayer: Sublayer | None) -> Site | None:
        kind = sublayer.kind if sublayer is not None else ""
        return next((site for site in self.sites.with_role("attention.core") if (site.kind or "") == kind), None)

    def _result(self, element: Element, station: Station, sublayer: Sublayer | None) -> str:
        """Return the value that an element computes, "" if unknown; record the station of its site."""
        match element:
            case LabelledBox(components=[_, *_]):
                site = self._site(element)
                if site is None:
                    return ""
                self.boxes.append((element, site))
                self.results[site.id] = station
                return site.ports.get("output", site.op)
            case LabelledBox() | SideBySide(meeting="core"):
                return self._core_result(station, sublayer)
            case SideBySide(meeting="times" | "bend") | Nonlinearity():
                return self._hidden_result(station, sublayer)
            case Gated(enters="result"):
                return self._weighed_result(sublayer)
            case Gated(enters="experts"):
                return self._result_of_line(element.main)
            case Experts():
                return self._result_of_line(element.line)
            case ResidualBranch():
                return self._joined(element, station)
            case _:
                return ""

    def _core_result(self, station: Station, sublayer: Sublayer | None) -> str:
        core = self._core(sublayer)
        if core is None:
            return ""
        self.results[core.id] = self.cores[core.id] = station
        return core.ports["output"]

    def _hidden_result(self, station: Station, sublayer: Sublayer | None) -> str:
        """Return the hidden value of a feed-forward: the input of the down projection on the same line, if known."""
        line, place = station
        after = [site for site in map(self._site, line.elements[place:]) if site is not None]
        hidden = list(self.sites.with_role("ffn.hidden"))
        read = {site.ports.get("input") for site in after}
        chosen = next((site for site in hidden if site.ports["output"] in read), hidden[0] if hidden else None)
        if chosen is None:
            return ""
        self.results[chosen.id] = station
        return chosen.ports["output"]

    def _weighed_result(self, sublayer: Sublayer | None) -> str:
        """Return the weighed result of an attention, as its output projection reads it."""
        outputs = [] if sublayer is None else sublayer.of("attention.o")
        site = self.sites.of(outputs[0]) if outputs else None
        return site.ports["input"] if site is not None else ""

    def _result_of_line(self, line: Line) -> str:
        """Return the value that the last box of a line computes."""
        for element in reversed(line.elements):
            site = self._site(element)
            if site is not None:
                return site.ports.get("output", "")
        return ""

    def _joined(self, element: ResidualBranch, station: Station) -> str:
        joins = [site.ports["join"] for site in map(self.sites.of, element.sublayers) if site and "join" in site.ports]
        self.also += [(join, station) for join in joins]
        return joins[-1] if joins else ""


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_signal(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return node.op != "get_attr" and isinstance(first, Tensor) and first.dtype.is_floating_point


def names_of(site: Site) -> Mapping[str, str]:
    """Return the stored parameters of a site with their names in formulas."""
    weight, bias = site.weight and site.weight.parameter, site.bias and site.bias.parameter
    return {name: letter for name, letter in ((weight, "W"), (site.scale, "g"), (bias, "b")) if name}


def mark_trained(boxes: Iterable[tuple[LabelledBox, Site]], names: Iterable[str], css: str) -> None:
    """Mark the boxes whose own parameters are among some that train."""
    trained = set(names)
    for box, site in boxes:
        for name, letter in names_of(site).items():
            if name in trained and (css, letter) not in box.marks:
                box.marks.append((css, letter))
