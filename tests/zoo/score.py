"""How well the sites of a traced model agree with what is known to be inside it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import fx, nn

from peftgraph.ir.program import ProgramData
from peftgraph.sites import Site, Sites

from .entry import Expected, Part, Truth

ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.o")
TALLIES = ("outputs", "attention", "roles", "columns", "ffn", "layers", "kinds", "layout")
FEEDFORWARD = ("ffn.up", "ffn.gate", "ffn.down")


@dataclass
class Tally:
    """Found of expected."""

    found: int = 0
    expected: int = 0

    def add(self, hit: bool) -> bool:
        self.found += hit
        self.expected += 1
        return hit

    @property
    def percent(self) -> float:
        return 100.0 * self.found / self.expected if self.expected else 100.0

    def __str__(self) -> str:
        return f"{self.found}/{self.expected}" if self.expected else ""


@dataclass
class Row:
    """One model of the report.

    Attributes:
        refusal: why it was not traced; "" when it was.
        outputs: whether the program gives what the model gives, in evaluation.
        false: attentions found where there is none.
        seconds: time of the search for sites, after tracing.
        misses: what disagrees, one line each.
    """

    name: str
    group: str
    refusal: str = ""
    outputs: Tally = field(default_factory=Tally)
    attention: Tally = field(default_factory=Tally)
    false: int = 0
    roles: Tally = field(default_factory=Tally)
    columns: Tally = field(default_factory=Tally)
    ffn: Tally = field(default_factory=Tally)
    layers: Tally = field(default_factory=Tally)
    kinds: Tally = field(default_factory=Tally)
    layout: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    misses: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """The row as plain values, to send it to another process."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Row:
        return cls(**{key: Tally(**value) if key in TALLIES else value for key, value in values.items()})


class Score:
    """Fills a row."""

    def __init__(self, row: Row, program: ProgramData, sites: Sites, truth: Truth, ties: Mapping[str, str]) -> None:
        self.row, self.sites, self.truth, self.ties = row, sites, truth, ties
        self.tensors = program.table.tensors()
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.by_weight: dict[tuple[str, str], list[Site]] = defaultdict(list)
        for site in sites:
            if site.weight is not None:
                self.by_weight[site.role, self._tied(site.weight.parameter)].append(site)

    def fill(self) -> Row:
        if self.truth.attentions is not None:
            self._cores(self.truth.attentions)
            for one in self.truth.attentions:
                self._roles(one)
            self._extra(ATTENTION, self.truth.attentions)
        if self.truth.feedforwards is not None:
            for one in self.truth.feedforwards:
                self._feedforward(one)
            if self.truth.feedforwards:
                self._extra(FEEDFORWARD, self.truth.feedforwards)
        return self.row

    def _tied(self, name: str) -> str:
        return self.ties.get(name, name)

    def _miss(self, text: str) -> None:
        self.row.misses.append(text)

    def _cores(self, expected: tuple[Expected, ...]) -> None:
        wanted: Counter[str] = Counter()
        for one in expected:
            wanted[one.path] += one.uses
        found: Counter[str] = Counter()
        for site in self.sites:
            if site.role != "attention.core":
                continue
            inside = [path for path in stack(self.nodes[site.op]) if path in wanted]
            if not inside or found[inside[-1]] >= wanted[inside[-1]]:
                self.row.false += 1
                self._miss(f"false attention: {site.op} in {(stack(self.nodes[site.op]) or ['the model'])[-1]}")
            else:
                found[inside[-1]] += 1
        for path, count in wanted.items():
            self.row.attention.expected += count
            self.row.attention.found += found[path]
            if found[path] < count:
                self._miss(f"no attention: {path} ({found[path]} of {count})")

    def _roles(self, one: Expected) -> None:
        for part in one.parts:
            sites = self.by_weight.get((part.role, self._tied(part.parameter)), [])
            if not self._role(self.row.roles, part, sites):
                continue
            self._place(one, part, sites)
            if part.role == "attention.q":
                self._layout(one, part, sites)
            kinds = {site.kind for site in sites}
            if one.kind is not None and part.role == "attention.q" and not self.row.kinds.add(kinds == {one.kind}):
                self._miss(f"kind of {part.parameter}: {sorted(map(str, kinds))} for {one.kind}")

    def _role(self, tally: Tally, part: Part, sites: list[Site]) -> bool:
        if part.optional and not sites:
            return False
        if not tally.add(bool(sites)):
            name = self._tied(part.parameter)
            others = sorted({role for role, weight in self.by_weight if weight == name and role != "bias"})
            self._miss(f"no {part.role}: {part.parameter} is {', '.join(others) or 'nothing'}")
            return False
        owned = self._owned(sites)
        if part.columns is None:
            if owned is not None and not part.optional:
                self._miss(f"columns of {part.role}: only {runs(owned)} of {part.parameter}")
        elif not self.row.columns.add(owned == part.columns):
            self._miss(f"columns of {part.role}: {runs(owned)} for {runs(part.columns)} in {part.parameter}")
        return True

    def _owned(self, sites: list[Site]) -> set[int] | None:
        """The output features of the stored weight that the sites own; None when they own all."""
        weights = [site.weight for site in sites if site.weight is not None]
        owned = {column for weight in weights for column in weight.window or ()}
        whole = replace(weights[0], window=None).shape(self.tensors)[0]
        return None if any(weight.window is None for weight in weights) or len(owned) == whole else owned

    def _place(self, one: Expected, part: Part, sites: list[Site]) -> None:
        if one.layer is None or one.uses != 1:
            return
        layers = {site.layer for site in sites}
        if not self.row.layers.add(layers == {one.layer}):
            self._miss(f"layer of {part.parameter}: {sorted(map(str, layers))} for {one.layer}")

    def _layout(self, one: Expected, part: Part, sites: list[Site]) -> None:
        """Compares the norms of the sublayer that a part stands in, where layer, stack and kind say which one."""
        role = part.role.partition(".")[0]
        places = {(site.layer, site.stack, site.kind) for site in sites if site.layer is not None}
        held = [site for site in self.sites if site.role == role and (site.layer, site.stack, site.kind) in places]
        if one.layout is None or not held or one.uses != 1:
            return
        found = {site.layout for site in held}
        if not self.row.layout.add(found == {one.layout}):
            self._miss(f"layout around {part.parameter}: {', '.join(sorted(map(str, found)))} for {one.layout}")

    def _feedforward(self, one: Expected) -> None:
        tally = Tally()
        for part in one.parts:
            sites = self.by_weight.get((part.role, self._tied(part.parameter)), [])
            if self._role(tally, part, sites):
                self._place(one, part, sites)
                if part.role == "ffn.down":
                    self._layout(one, part, sites)
        self.row.ffn.add(tally.found == tally.expected)

    def _extra(self, roles: Iterable[str], expected: tuple[Expected, ...]) -> None:
        """Roles that the truth does not have; it knows of no attention without a softmax."""
        known = {(part.role, self._tied(part.parameter)) for one in expected for part in one.parts}
        known |= {key for key, sites in self.by_weight.items() if all(site.kind == "linear" for site in sites)}
        for role, name in sorted(key for key in self.by_weight if key[0] in roles and key not in known):
            self._miss(f"extra {role}: {name}")


def stack(node: fx.Node) -> list[str]:
    """The paths of the modules a node was traced in, outermost first."""
    found = node.meta.get("nn_module_stack") or {}
    return [str(value[0]).removeprefix("L['self'].").partition("@")[0] for value in found.values()]


def runs(columns: Iterable[int] | None) -> str:
    """Column numbers as ranges: "0:16, 32:48"."""
    ranges: list[list[int]] = []
    for column in sorted(columns or ()):
        if ranges and ranges[-1][1] == column:
            ranges[-1][1] = column + 1
        else:
            ranges.append([column, column + 1])
    shown = ", ".join(f"{start}:{stop}" for start, stop in ranges[:4])
    return shown + (", ..." if len(ranges) > 4 else "") if ranges else "all"


def ties_of(model: nn.Module) -> dict[str, str]:
    """Every name of a stored tensor -> the first of its names."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}
