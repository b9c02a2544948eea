"""Match: the interface through which a pass reads one site of a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.ir.edits import Anchor, EditLog
from peftgraph.ir.modes import DROPOUTS
from peftgraph.ir.program import AppliedPass, ProgramData
from peftgraph.ir.quantised_base import DEQUANTISES
from peftgraph.ir.site_statistics import SiteStatistics, Statistic
from peftgraph.ir.tensor_table import TensorTable
from peftgraph.rewrite.nesting import Nesting, nesting_of
from peftgraph.rewrite.weight_views import ParameterValue, View, bias_view, bind, rows_view, scale_view, weight_view
from peftgraph.sites import Columns, Equation, Lettered, Site, Sites
from peftgraph.sites.ports import PORTS, PortKind, is_read_by_all, kind_of, named_part, stored_port
from peftgraph.sites.roles import level_of
from peftgraph.sites.site import Form

aten = torch.ops.aten

TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
CONVOLUTIONS = TRANSPOSED | {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
POINTWISE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}  # by the axes they run along


@dataclass
class Match:
    """A site in a graph that is being rewritten.

    Values are looked up on access, so `input` is what the projection reads after all edits so far: passes on different
    sites commute.
    """

    site: Site
    sites: Sites
    graph: fx.Graph
    table: TensorTable
    edits: EditLog
    names: Mapping[str, fx.Node] = field(repr=False)
    precision: torch.dtype | None = None
    example: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    nesting_of_rule: Nesting | None = None
    history: Sequence[AppliedPass] = field(default=(), repr=False)
    calibration: Mapping[str, SiteStatistics] = field(default_factory=dict, repr=False)
    at_weight: bool = False
    transposed: bool = False
    builder: Builder | None = None
    _moved: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict, repr=False)

    def _weight_node(self) -> str:
        weight = self.site.weight
        assert weight is not None, f"{self.site} has no weight"
        if weight.computed is not None:
            return weight.computed
        names = self.table.tied(weight.parameter)
        return next(node for name in names for node in self._readers_of(name))

    def _readers_of(self, parameter: str) -> list[str]:
        """Return the base's nodes that read a stored tensor under one of its names, or compute it from codes."""
        if self.table[parameter].quantised is not None:
            found = [node.name for node in self.graph.nodes if node.meta.get(DEQUANTISES) == parameter]
            if found:
                return found
        return [
            node.name for node in self.graph.find_nodes(op="get_attr", target=parameter) if "origin" not in node.meta
        ]

    def ports_of_weight(self) -> list[str]:
        """Return the ports at which a change of the weight itself enters, so that all its readers read the changed
        one."""
        weight = self.site.weight
        assert weight is not None
        return ["weight"] if weight.computed is not None else self.ports_of_stored(weight.parameter)

    def ports_of_stored(self, parameter: str) -> list[str]:
        """Return the ports of a stored tensor: one for each name that the base reads it under."""
        return [stored_port(name) for name in self.table.tied(parameter) if self._readers_of(name)]

    @property
    def nesting(self) -> Nesting:
        """The nesting level of the edit: that of the site's role, unless the rule sets another."""
        return nesting_of(self.site.role) if self.nesting_of_rule is None else self.nesting_of_rule

    # values

    def anchor(self, port: str) -> Anchor:
        """Return where edits at a port enter: at the value for all its readers, or at the one operand that the site
        reads."""
        return Anchor(self.port(port), None if is_read_by_all(port) else self.reader(port))

    def has(self, port: str) -> bool:
        """Tell whether the site, or the model around it, has a port."""
        if port == "weight":
            return self.site.weight is not None
        return named_part(port) is not None or (_valued_at(port) or port) in self.site.ports

    def port(self, name: str) -> str:
        """Return the base graph's node at a port; `undropped` is the output, and `embedded` the input, before its
        dropout.

        `input:NAME` is an input of the model itself, and `result:NAME` a value that the model returns. `weight` is the
        weight of the site's operator, in its stored layout, and `stored:NAME` a stored tensor that the graph reads
        under that name.
        """
        named = named_part(name)
        if named is not None:
            return self._readers_of(named)[0] if kind_of(name) is PortKind.WEIGHT else named
        if name == "weight":
            return self._weight_node()
        if not self.has(name):
            raise PeftGraphError(
                f"{self.site} has no {name}; it has {', '.join(self.site.ports) or 'a weight alone'}. Choose other "
                "sites, or a pass that changes weights, such as lora."
            )
        valued_at = _valued_at(name)
        if not valued_at:
            return self.site.ports[name]
        node = self.names[self.site.ports[valued_at]]
        while node.target in DROPOUTS:
            node = self.names[self.edits.base_value(node.all_input_nodes[0].name)]
        return node.name

    def reader(self, port: str) -> str:
        """Return the node that reads a port's value."""
        if kind_of(port) is PortKind.MODEL_OUTPUT:
            return self.graph.output_node().name
        return self.site.readers.get(port, self.site.op)

    def value(self, port: str) -> fx.Node:
        """Return the current value at a port: the site's input, or its output at its own level of nesting. The features
        of a sublayer or block are last, whatever the model's own layout."""
        return self.features_last(self.raw_value(port))

    def raw_value(self, port: str) -> fx.Node:
        """Return the current value at a port, in the model's own layout."""
        node = self.port(port)
        if is_read_by_all(port):
            return self._latest(node, self.nesting)
        inside = self.edits.chain(self.anchor(port))
        return self.names[inside[-1].after] if inside else self._read(node, self.names[self.reader(port)])

    def _read(self, node: str, reader: fx.Node) -> fx.Node:
        """Return the value that `reader` reads in place of a value of the base: the latest, or the one that an edit
        fixed."""
        afters = [self.names[move.after] for move in self.edits.moves_at(node)]
        read = next((after for after in reversed(afters) if after in reader.all_input_nodes), self.names[node])
        return read if read in reader.all_input_nodes else self._latest(node, Nesting.OUTERMOST)

    def _latest(self, node: str, level: int) -> fx.Node:
        moves = [move for move in self.edits.moves_at(node) if move.level <= level]
        return self.names[moves[-1].after if moves else node]

    @property
    def _turned(self) -> bool:
        """Whether the site is a sublayer or block with its features on another axis than the last, as in images."""
        return level_of(self.site.role) > 0 and self.site.feature_axis != -1

    def features_last(self, value: fx.Node) -> fx.Node:
        """Return a value of the site with its features last, while an edit is built; for other sites, return the value
        unchanged."""
        if not self._turned or self.builder is None or value.meta["val"].dim() < -self.site.feature_axis:
            return value
        key = value, len(self.edits)
        if key not in self._moved:
            self._moved[key] = self.builder.call(aten.movedim.int, value, self.site.feature_axis, -1)
        return self._moved[key]

    def features_back(self, op: Builder, value: fx.Node) -> fx.Node:
        """Return the inverse of `features_last`."""
        if not self._turned or value.meta["val"].dim() < -self.site.feature_axis:
            return value
        return op.call(aten.movedim.int, value, -1, self.site.feature_axis)

    @property
    def inputs(self) -> list[fx.Node]:
        """The inputs of the model, in order."""
        return list(self.graph.find_nodes(op="placeholder"))

    def now(self, node: fx.Node) -> fx.Node:
        """Return the current replacement of a value of the base, after all edits so far."""
        return self._latest(node.name, Nesting.OUTERMOST)

    @property
    def input(self) -> fx.Node:
        """The site's input, (..., I)."""
        return self.value("input")

    @property
    def output(self) -> fx.Node:
        """The site's output, before edits of the sublayers around it. The features of a projection, a norm or a
        convolution are on `site.feature_axis`."""
        return self.value("output")

    def normed(self, op: Builder, x: fx.Node) -> fx.Node:
        """Apply to x, a value like a sublayer's residual sum, the norm that follows the sum in a post-norm block, with
        its own weights; return x itself where none follows."""
        if "normed" not in self.site.ports:
            return x
        normed = op.recompute(self.raw_value("join"), self.names[self.site.ports["normed"]], self.features_back(op, x))
        return self.features_last(normed)

    def changed_by(self, port: str) -> object | None:
        """Return the pass that made the current value at an output port of the site; None for the base's own."""
        current = self.raw_value(port).name
        edit = next((one for one in self.edits if any(move.after == current for move in one.moves)), None)
        return None if edit is None else self.history[edit.application].method

    def statistic(self, which: Statistic) -> torch.Tensor:
        """Return a statistic of data at the site, which the pass asks for (`Pass.statistics`).

        Raises:
            PeftGraphError: the program was not calibrated for it here.
        """
        known = self.calibration.get(self.site.id)
        value = None if known is None else getattr(known, which)
        if value is None:
            raise PeftGraphError(
                f"{self.site.id}: this start is computed from data ({which}). Calibrate the program first: "
                "program.calibrate(batches, method).apply(method)."
            )
        return value

    def related(self, selector: object, same_layer: bool = False) -> tuple[Match, ...]:
        """Return the matches of other sites in the same graph, for methods that read more than one site."""
        found = self.sites.select(selector)
        if same_layer:
            found = tuple(s for s in found if (s.stack, s.layer) == (self.site.stack, self.site.layer))
        return tuple(replace(self, site=site) for site in found)

    def at_site(self, site: Site) -> Match:
        """Return the match of another site in the same graph."""
        return replace(self, site=site)

    # weights

    @property
    def weight(self) -> ParameterValue:
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

    def rows(self, numbers: Sequence[int]) -> ParameterValue:
        """Return rows of the site's table, (N, D): those of tokens for an embedding, of output features for a
        projection."""
        self._weight_view()
        return bind(rows_view(self.site, numbers), self.table, self.precision)

    def shares_weight(self, other: Match) -> bool:
        """Tell whether another site's weight is stored under the same name or a tied one."""
        mine, theirs = self.site.weight, other.site.weight
        return mine is not None and theirs is not None and theirs.parameter in self.table.tied(mine.parameter)

    @property
    def scale(self) -> ParameterValue | None:
        """Return the scale of a norm, (O,); None when it has none."""
        view = scale_view(self.site)
        return None if view is None else bind(view, self.table, self.precision)

    @property
    def bias(self) -> ParameterValue | None:
        """The site's bias, (O,) or (E, O); None if it has none."""
        view = bias_view(self.site)
        return None if view is None else bind(view, self.table, self.precision)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) features of the site's own part of its weight. Where the site multiplies by the transpose of
        another site's weight and shares that site's parameters, those of the other site."""
        view = self._weight_view()
        *_, out, inner = view.shape(self.table[view.parameter].tensor)
        return (inner, out) if self.transposed else (out, inner)

    @property
    def experts(self) -> tuple[int, ...]:
        """(E,) for stacked experts, otherwise (): the leading dimensions of every parameter made at this site."""
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
        return int(self.raw_value("output").meta["val"].shape[self.site.feature_axis])

    def own_parameters(self, bias_only: bool = False) -> Iterable[View]:
        """Return the site's own stored tensors: weight, scale of a norm, bias; only the bias for a `bias` site."""
        bias = bias_view(self.site)
        if bias_only or self.site.role == "bias":
            return [] if bias is None else [bias]
        return [view for view in (weight_view(self.site), scale_view(self.site), bias) if view is not None]

    # computation in the site's own form

    @property
    def form(self) -> Form:
        """Where the rule's result enters: at the site's output, or in the weight that it reads."""
        return "weight" if self.at_weight else "output"

    def down(self, op: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
        """Return x W^T, computed like the site's own product: W (R, I), or (E, R, I) with each row's own expert.

        The R features are on the axis of the site's output features.
        """
        if self.site.role == "embedding":
            return op.call(aten.embedding.default, op.call(aten.t.default, weight), x)
        if self.site.equation is not None:
            return self._by_letters(op, x, weight, self.site.equation.narrowing())
        if self._convolves:
            return self._convolved(op, x, weight)
        return self._product(op, x, weight)

    def up(self, op: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
        """Return x W^T from a narrow space, in the layout of `down`, to the features that the site owns: W (O, R), or
        (E, O, R)."""
        if self.site.equation is not None:
            return self._like_output(op, self._by_letters(op, x, weight, self.site.equation.widening()))
        if self._convolves:
            kernel = op.call(aten.reshape.default, weight, [*weight.meta["val"].shape, *[1] * self._spatial])
            return op.call(POINTWISE[self._spatial], x, kernel)
        return self._like_output(op, self._product(op, x, weight))

    def _product(self, op: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
        """Return x W^T where the features are last."""
        if "offsets" in self.site.ports:
            transposed = op.call(aten.transpose.int, weight, -2, -1)
            return op.call(self.names[self.site.op].target, x, transposed, self.names[self.site.ports["offsets"]])  # pyright: ignore[reportArgumentType]
        if "chosen" in self.site.ports:
            weight = op.call(aten.index_select.default, weight, 0, self.names[self.site.ports["chosen"]])
            if self.site.feature_axis == -2:  # each row is a column vector: W x
                return op.call(aten.bmm.default, weight, x)
        if self.experts:
            return op.call(aten.matmul.default, x, op.call(aten.transpose.int, weight, -2, -1))
        return op.linear(x, weight)

    def _by_letters(self, op: Builder, x: fx.Node, weight: fx.Node, product: Lettered) -> fx.Node:
        """Return the einsum of x with a matrix whose features span several letters."""
        shape = weight.meta["val"].shape
        if len(shape) != len(product.sizes):
            weight = op.call(aten.reshape.default, weight, product.sizes)
        return op.call(aten.einsum.default, product.equation, [x, weight])

    @property
    def _convolves(self) -> bool:
        return self.names[self.site.op].target in CONVOLUTIONS

    @property
    def _spatial(self) -> int:
        """The number of axes that a convolution runs along."""
        return -1 - self.site.feature_axis

    def _convolved(self, op: Builder, x: fx.Node, weight: fx.Node) -> fx.Node:
        """Convolve x with a kernel (R, I k ...), with the site's own stride, padding and dilation."""
        node = self.names[self.site.op]
        operand = node.args[1]
        assert isinstance(operand, fx.Node)
        kernel_shape = operand.meta["val"].shape
        turned = node.target in TRANSPOSED
        inner, size = kernel_shape[0 if turned else 1], kernel_shape[2:]
        kernel = op.call(aten.reshape.default, weight, [int(weight.meta["val"].shape[0]), int(inner), *map(int, size)])
        if turned:
            kernel = op.call(aten.transpose.int, kernel, 0, 1)
        assert not isinstance(node.target, str)
        return op.call(
            node.target, x, kernel, None, *node.args[3:], **{k: v for k, v in node.kwargs.items() if k != "bias"}
        )

    def _like_output(self, op: Builder, value: fx.Node) -> fx.Node:
        """Bring a product into the shape of the output, where a view is between the site's product and its bias."""
        if self.site.columns is not None or value.meta["val"].dim() == self.output.meta["val"].dim():
            return value
        return op.call(aten.view_as.default, value, self.output)

    def along_features(self, op: Builder, vector: fx.Node) -> fx.Node:
        """Return a vector (F,), or (E, F) for stacked experts, in a shape that broadcasts over the site's output, or
        over the rows of its weight where a change enters the weight."""
        if self.form == "weight":
            return op.call(aten.unsqueeze.default, vector, -1)
        if self.site.equation is not None:
            return self._along_letters(op, vector, self.site.equation)
        if "offsets" in self.site.ports:
            return op.call(aten.index_select.default, vector, 0, self._expert_of_row(op))
        if "chosen" in self.site.ports:
            rows = op.call(aten.index_select.default, vector, 0, self.names[self.site.ports["chosen"]])
            flat = self.output.meta["val"].dim() == 2
            return rows if flat else op.call(aten.unsqueeze.default, rows, 1 if self.site.feature_axis == -1 else -1)
        if self.experts:
            return op.call(aten.unsqueeze.default, vector, 1)
        for _ in range(-1 - self.site.feature_axis):
            vector = op.call(aten.unsqueeze.default, vector, -1)
        return vector

    def _along_letters(self, op: Builder, vector: fx.Node, equation: Equation) -> fx.Node:
        """Return a vector over the letters of the weight that are in the product, in the product's order."""
        hidden = self.site.role == "ffn.hidden"  # what the site gives is what its projection reads
        own = equation.stacked + (equation.inner if hidden else equation.outer)
        result = equation.x if hidden else equation.result
        ordered = [letter for letter in result if letter in own]
        if len(own) > 1:
            vector = op.call(aten.reshape.default, vector, equation.lengths(own))
            if ordered != list(own):
                vector = op.call(aten.permute.default, vector, [own.index(letter) for letter in ordered])
        sizes = dict(equation.sizes)
        return op.call(aten.reshape.default, vector, [sizes[one] if one in ordered else 1 for one in result])

    def _expert_of_row(self, op: Builder) -> fx.Node:
        rows = op.call(aten.sym_size.int, self.output, 0)
        numbers = op.call(aten.arange.default, rows, dtype=torch.int32, device=op.device)
        return op.call(aten.searchsorted.Tensor, self.names[self.site.ports["offsets"]], numbers, right=True)

    def on_columns(
        self, op: Builder, value: fx.Node, change: Callable[[fx.Node], fx.Node], columns: Columns | None = None
    ) -> fx.Node:
        """Apply `change` to some columns of `value`, by default those that the site owns; all others stay bit for
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
        """Return the output of the base's own projection before all edits of it: the site's own columns."""
        return _window(op, self.names[self.port("output")], self.site.columns, self.site.feature_axis, "columns")

    def base_product(self, op: Builder) -> fx.Node:
        """Return the contribution of the base's own weight where a change enters: the output without its bias, or the
        weight itself, (O, I)."""
        if self.form == "weight":
            return self.read(op, self.weight)
        y = self.base_output(op)
        return (
            y if self.bias is None else op.call(aten.sub.Tensor, y, self.along_features(op, self.read(op, self.bias)))
        )

    def read(self, op: Builder, bound: ParameterValue) -> fx.Node:
        """Read the window of a stored tensor in the graph, in the shape of `bound.value` and the stored dtype."""
        view = bound.view
        full = self._stored_value(op, view)
        if view.vector:
            return _window(op, full, view.window, -1, "entries")
        return _window(op, self._oriented(op, full, view), view.window, -2, "rows")

    def _stored_value(self, op: Builder, view: View) -> fx.Node:
        """Return a stored tensor, or the weight that is computed from it, after its edits so far."""
        weight = self.site.weight
        if weight is None or weight.parameter != view.parameter:
            return op.stored_tensor(view.parameter, self.table[view.parameter].tensor)
        plain = self.names[self.port("weight")].op == "get_attr"
        if weight.computed is None and plain and not self.edits.moves_at(self.port("weight")):
            return op.stored_tensor(view.parameter, self.table[view.parameter].tensor)
        return self.value("weight")

    def changed_weight(self, op: Builder, full: fx.Node, change_OI: fx.Node) -> fx.Node:
        """Return a weight in its stored layout with a change of the site's own window (O, I) added to it."""
        view = self._weight_view()
        if view.window is not None:
            matrix, columns = self._oriented(op, full, view), view.window
            part = op.add(_window(op, matrix, columns, -2, "rows"), change_OI)
            if columns.contiguous:
                matrix = op.call(
                    aten.slice_scatter.default, matrix, part, -2, columns.starts_at, columns.starts_at + len(columns)
                )
            else:
                matrix = op.call(aten.index_copy.default, matrix, -2, op.constant("rows", columns.index()), part)
            return self._restored(op, matrix, full, view)
        return op.add(full, self._restored(op, change_OI, full, view))

    def _oriented(self, op: Builder, full: fx.Node, view: View) -> fx.Node:
        """Return a stored tensor as a matrix (O, I), or a stack of them."""
        axes = view.axes_of(full.meta["val"])
        if axes is None:
            return op.call(aten.transpose.int, full, -2, -1) if view.transposed else full
        split = op.call(aten.reshape.default, full, list(axes.sizes))
        turned = op.call(aten.permute.default, split, list(axes.order))
        return op.call(aten.reshape.default, turned, [*(axes.sizes[axis] for axis in axes.stacked), *axes.shape])

    def _restored(self, op: Builder, matrix: fx.Node, full: fx.Node, view: View) -> fx.Node:
        """Return the inverse of `_oriented`: a matrix in the layout of a stored tensor."""
        axes = view.axes_of(full.meta["val"])
        if axes is None:
            return op.call(aten.transpose.int, matrix, -2, -1) if view.transposed else matrix
        split = op.call(aten.reshape.default, matrix, [axes.sizes[axis] for axis in axes.order])
        back = [axes.order.index(axis) for axis in range(len(axes.order))]
        return op.call(
            aten.reshape.default, op.call(aten.permute.default, split, back), [int(n) for n in full.meta["val"].shape]
        )


def _valued_at(port: str) -> str:
    """Return the port whose value a port has before its dropout; "" for a value of its own."""
    return PORTS[port].before_dropout_of if port in PORTS else ""


def _window(op: Builder, value: fx.Node, columns: Columns | None, axis: int, name: str) -> fx.Node:
    if columns is None:
        return value
    if columns.contiguous:
        return op.call(aten.slice.Tensor, value, axis, columns.starts_at, columns.starts_at + len(columns))
    return op.call(aten.index_select.default, value, axis, op.constant(name, columns.index()))


def match_all(program: ProgramData, sites: Sites, chosen: Iterable[Site]) -> list[Match]:
    """Return the matches of `chosen` in the program's own graph."""
    names = {node.name: node for node in program.graph.nodes}
    edits = EditLog(program.edits)
    return [Match(site, sites, program.graph, program.table, edits, names, example=program.examples) for site in chosen]
