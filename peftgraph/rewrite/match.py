"""A match: one site of one program, as a pass sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.ir.modes import DROPOUTS
from peftgraph.ir.program import Applied, Edits, ProgramData
from peftgraph.ir.table import Table
from peftgraph.rewrite.views import Bound, View, bias_view, bind, rows_view, weight_view
from peftgraph.sites import Columns, Site, Sites

aten = torch.ops.aten

Own = Literal["all", "bias"]

CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}

# How deep a role's value is nested: a projection's own output lies inside its sublayer's, that inside its block's.
LEVELS = {"attention": 1, "ffn": 1, "block": 2}

# The level of an edit that changes what a site itself computes: below the edits of all other passes.
INNERMOST = -1

# The level of an edit that changes what all that stands within a site's own computation gives.
OUTERMOST = max(LEVELS.values())

# Ports whose value the site gives to all its users; at every other port the site reads a value that others may read
# too.
GIVEN = {"output", "undropped", "embedded", "join", "normed"}

# Ports of the model around the site: what it is called with, and what it returns.
INPUT, RESULT = "input:", "result:"

# Ports that lie before the dropout on the value of another one: a sublayer's output, and what enters a block.
BEFORE_DROPOUT = {"undropped": "output", "embedded": "input"}


def is_given(port: str) -> bool:
    """Whether an edit at a port is for all who use the value there."""
    return port in GIVEN or port.startswith(INPUT)


@dataclass
class Match:
    """A site in a graph that is being rewritten.

    Values are looked up when they are read, so `input` is what the projection reads after every edit made so far:
    passes on different sites commute.
    """

    site: Site
    sites: Sites
    graph: fx.Graph
    table: Table
    edits: Edits
    names: Mapping[str, fx.Node] = field(repr=False)
    precision: torch.dtype | None = None
    example: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    level_of_rule: int | None = None
    history: Sequence[Applied] = field(default=(), repr=False)

    @property
    def level(self) -> int:
        """The nesting level of the edit: that of the site's values, unless the rule has another."""
        return LEVELS.get(self.site.role, 0) if self.level_of_rule is None else self.level_of_rule

    # values

    def anchor(self, port: str) -> str:
        """The key of the chain of edits at a port: a value that the site gives, or the edge by which it reads one."""
        node = self.port(port)
        return node if is_given(port) else f"{node}@{self.reader(port)}"

    def has(self, port: str) -> bool:
        """Whether the site, or the model around it, has that port."""
        return port.startswith((INPUT, RESULT)) or BEFORE_DROPOUT.get(port, port) in self.site.ports

    def port(self, name: str) -> str:
        """The base graph's node at a port; `undropped` is the output, and `embedded` the input, before its dropout.

        `input:NAME` is an input of the model itself, and `result:NAME` a value that the model returns.
        """
        if name.startswith((INPUT, RESULT)):
            return name.partition(":")[2]
        if name not in BEFORE_DROPOUT:
            return self.site.ports[name]
        node = self.names[self.site.ports[BEFORE_DROPOUT[name]]]
        while node.target in DROPOUTS:
            node = self.names[self.edits.below(node.all_input_nodes[0].name)]
        return node.name

    def reader(self, port: str) -> str:
        """The node that reads a port's value."""
        if port.startswith(RESULT):
            return self.graph.output_node().name
        return self.site.ports.get(f"{port}.reader", self.site.op)

    def value(self, port: str) -> fx.Node:
        """The current value at a port: what the site reads, or what it gives at its own level of nesting."""
        node = self.port(port)
        if is_given(port):
            return self._latest(node, self.level)
        inside = self.edits.chain(self.anchor(port))
        return self.names[inside[-1].after] if inside else self._read(node, self.names[self.reader(port)])

    def _read(self, node: str, reader: fx.Node) -> fx.Node:
        """What `reader` reads in the place of a value of the base: the latest, or what an edit held it to."""
        afters = [self.names[move.after] for move in self.edits.chain(node)]
        read = next((after for after in reversed(afters) if after in reader.all_input_nodes), self.names[node])
        return read if read in reader.all_input_nodes else self._latest(node, OUTERMOST)

    def _latest(self, node: str, level: int) -> fx.Node:
        moves = [move for move in self.edits.chain(node) if move.level <= level]
        return self.names[moves[-1].after if moves else node]

    @property
    def inputs(self) -> list[fx.Node]:
        """The inputs of the model, in order."""
        return list(self.graph.find_nodes(op="placeholder"))

    def now(self, node: fx.Node) -> fx.Node:
        """What stands in the place of a value of the base after every edit so far."""
        return self._latest(node.name, OUTERMOST)

    @property
    def input(self) -> fx.Node:
        """What the site reads, (..., I)."""
        return self.value("input")

    @property
    def output(self) -> fx.Node:
        """What the site gives, before edits of the sublayers around it; features on `site.feature_axis`."""
        return self.value("output")

    def normed(self, op: Builder, x: fx.Node) -> fx.Node:
        """x, a value like the one after a sublayer's residual add, through the norm that follows it in a post-norm
        block, with its own weights; x itself where none follows."""
        if "normed" not in self.site.ports:
            return x
        return op.again(self.value("join"), self.names[self.site.ports["normed"]], x)

    def changed_by(self, port: str) -> object | None:
        """The pass that put the current value at a port that the site gives; None for the base's own."""
        current = self.value(port).name
        edit = next((one for one in self.edits if any(move.after == current for move in one.moves)), None)
        return None if edit is None else self.history[edit.application].method

    def related(self, selector: object, same_layer: bool = False) -> tuple[Match, ...]:
        """Matches of other sites in the same graph, for methods that read more than one site."""
        found = self.sites.select(selector)
        if same_layer:
            found = tuple(s for s in found if (s.stack, s.layer) == (self.site.stack, self.site.layer))
        return tuple(replace(self, site=site) for site in found)

    # weights

    @property
    def weight(self) -> Bound:
        """The site's weight, (O, I), or (E, O, I) for stacked experts."""
        return bind(self._weight_view(), self.table, self.precision)

    def _weight_view(self) -> View:
        view = weight_view(self.site)
        if view is None:
            raise PeftGraphError(
                f"{self.site} has no weight: it is no projection, and this pass needs one. Choose projections, or a "
                "pass that only changes a value, such as serial_adapter."
            )
        return view

    def rows(self, numbers: Sequence[int]) -> Bound:
        """Rows of the site's table, (N, D): of the tokens that an embedding looks up, or a projection's outputs."""
        self._weight_view()
        return bind(rows_view(self.site, numbers), self.table, self.precision)

    def shares_weight(self, other: Match) -> bool:
        """Whether the weight of another site is stored under the same name or one that is tied to it."""
        mine, theirs = self.site.weight, other.site.weight
        return mine is not None and theirs is not None and theirs.parameter in self.table.tied(mine.parameter)

    @property
    def bias(self) -> Bound | None:
        """The site's bias, (O,) or (E, O); None when it has none."""
        view = bias_view(self.site)
        return None if view is None else bind(view, self.table, self.precision)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) features of the site's own part of its weight."""
        view = self._weight_view()
        *_, out, inner = view.shape(self.table[view.parameter].tensor)
        return out, inner

    @property
    def experts(self) -> tuple[int, ...]:
        """(E,) for stacked experts, else (): the leading dimensions of every parameter made at this site."""
        count = None if self.site.weight is None else self.site.weight.experts
        return () if count is None else (count,)

    @property
    def features(self) -> int:
        """The number of features of `output` that the site owns."""
        if self.site.columns is not None:
            return len(self.site.columns)
        if self.site.weight is not None:
            out, inner = self.shape
            return inner if self.site.role == "ffn.hidden" else out
        return int(self.output.meta["val"].shape[self.site.feature_axis])

    def own_parameters(self, own: Own = "all") -> Iterable[View]:
        """The stored tensors of the site itself: weight, scale of a norm, bias; the bias alone for a `bias` site."""
        bias = bias_view(self.site)
        if own == "bias" or self.site.role == "bias":
            return [] if bias is None else [bias]
        scale = None if self.site.scale is None else View(self.site.scale, vector=True)
        return [view for view in (weight_view(self.site), scale, bias) if view is not None]

    # computation in the site's own form

    def down(self, op: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
        """x W^T as the site itself multiplies: W (R, I), or (E, R, I) with each row's own expert."""
        if self.site.role == "embedding":
            return op.call(aten.embedding.default, op.call(aten.t.default, weight), x)
        return self.up(op, x, weight)

    def up(self, op: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
        """x W^T from a narrow space to the features that the site owns: W (O, R), or (E, O, R)."""
        if "offsets" in self.site.ports:
            transposed = op.call(aten.transpose.int, weight, -2, -1)
            return op.call(self.names[self.site.op].target, x, transposed, self.names[self.site.ports["offsets"]])  # pyright: ignore[reportArgumentType]
        if "chosen" in self.site.ports:
            weight = op.call(aten.index_select.default, weight, 0, self.names[self.site.ports["chosen"]])
            if self.site.feature_axis == -2:  # each row is a column vector: W x
                return op.call(aten.bmm.default, weight, x)
        if self.experts:
            return op.call(aten.matmul.default, x, op.call(aten.transpose.int, weight, -2, -1))
        if self.names[self.site.op].target in CONVOLUTIONS:
            return self._pointwise_convolution(op, x, weight)
        flat = op.linear(self._flattened(op, x, int(weight.meta["val"].shape[-1])), weight)
        return self._unflattened(op, flat)

    def _flattened(self, op: Builder, x: fx.Node, inner: int) -> fx.Node:
        """x with its trailing axes joined to one of `inner` features, where an einsum contracts several."""
        shape, axes = x.meta["val"].shape, 1
        while int(math.prod(shape[-axes:])) < inner:
            axes += 1
        return x if axes == 1 else op.call(aten.flatten.using_ints, x, -axes, -1)

    def _unflattened(self, op: Builder, flat: fx.Node) -> fx.Node:
        """Features on as many axes as the site's own output has them on, where an einsum gives several."""
        output = self.output.meta["val"]
        if (
            self.site.columns is not None
            or flat.meta["val"].shape[-1] != self.features
            or output.dim() == flat.meta["val"].dim()
        ):
            return flat
        sizes = [
            n if isinstance(n, int) else op.call(aten.sym_size.int, self.output, i) for i, n in enumerate(output.shape)
        ]
        return op.call(aten.reshape.default, flat, sizes)

    def _pointwise_convolution(self, op: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
        for _ in range(x.meta["val"].dim() - 2):
            weight = op.call(aten.unsqueeze.default, weight, -1)
        target = self.names[self.site.op].target
        assert not isinstance(target, str)
        return op.call(target, x, weight)

    def along_features(self, op: Builder, vector: fx.Node) -> fx.Node:
        """A vector (F,), or (E, F) for stacked experts, shaped to broadcast over the site's output."""
        if "offsets" in self.site.ports:
            return op.call(aten.index_select.default, vector, 0, self._expert_of_row(op))
        if "chosen" in self.site.ports:
            rows = op.call(aten.index_select.default, vector, 0, self.names[self.site.ports["chosen"]])
            flat = self.output.meta["val"].dim() == 2
            return rows if flat else op.call(aten.unsqueeze.default, rows, 1 if self.site.feature_axis == -1 else -1)
        if self.experts:
            return op.call(aten.unsqueeze.default, vector, 1)
        output = self.output.meta["val"]
        if self.site.columns is None and int(output.shape[self.site.feature_axis]) != self.features:
            return op.call(aten.reshape.default, vector, [int(n) for n in output.shape[self.site.feature_axis :]])
        for _ in range(-1 - self.site.feature_axis):
            vector = op.call(aten.unsqueeze.default, vector, -1)
        return vector

    def _expert_of_row(self, op: Builder) -> fx.Node:
        rows = op.call(aten.sym_size.int, self.output, 0)
        numbers = op.call(aten.arange.default, rows, dtype=torch.int32, device=op.device)
        return op.call(aten.searchsorted.Tensor, self.names[self.site.ports["offsets"]], numbers, right=True)

    def on_columns(
        self, op: Builder, value: fx.Node, change: Callable[[fx.Node], fx.Node], columns: Columns | None = None
    ) -> fx.Node:
        """`value` with `change` applied to some columns, those that the site owns by default; all others keep every
        bit."""
        columns, axis = columns or self.site.columns, self.site.feature_axis
        if columns is None:
            return change(value)
        part = change(_window(op, value, columns, axis, "columns"))
        if columns.contiguous:
            window = (axis, columns.starts_at, columns.starts_at + len(columns))
            return op.call(aten.slice_scatter.default, value, part, *window)
        return op.call(aten.index_copy.default, value, axis, op.constant("columns", columns.index()), part)

    def base_output(self, op: Builder) -> fx.Node:
        """What the base's own projection gives now, before every edit of its output; the site's own columns."""
        return self._own_part(op, self.names[self.port("output")])

    def _own_part(self, op: Builder, value: fx.Node) -> fx.Node:
        return _window(op, value, self.site.columns, self.site.feature_axis, "columns")

    def read(self, op: Builder, bound: Bound) -> fx.Node:
        """The window of a stored tensor as a value in the graph, shaped like `bound.value`, in the stored dtype."""
        view = bound.view
        full = op.stored(view.parameter, self.table[view.parameter].tensor)
        if view.vector:
            return _window(op, full, view.window, -1, "entries")
        if view.experts is None and full.meta["val"].dim() > 2:
            full = op.call(aten.flatten.using_ints, full, 1)
        full = op.call(aten.transpose.int, full, -2, -1) if view.transposed else full
        return _window(op, full, view.window, -2, "rows")


def _window(op: Builder, value: fx.Node, columns: Columns | None, axis: int, name: str) -> fx.Node:
    if columns is None:
        return value
    if columns.contiguous:
        return op.call(aten.slice.Tensor, value, axis, columns.starts_at, columns.starts_at + len(columns))
    return op.call(aten.index_select.default, value, axis, op.constant(name, columns.index()))


def match_all(program: ProgramData, sites: Sites, chosen: Iterable[Site]) -> list[Match]:
    """Matches of `chosen` in the program's own graph."""
    names = {node.name: node for node in program.graph.nodes}
    edits = Edits(program.edits)
    return [Match(site, sites, program.graph, program.table, edits, names, example=program.examples) for site in chosen]
