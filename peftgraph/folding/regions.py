"""Proves a fold where it changes something: region by region, in float64, on random inputs.

Both graphs are walked in order. A value of the folded graph that is computed by the same call of values which agree is
the adapted graph's own. Where an edit was, the value that the adapted graph has in its place is computed from what
enters there, and so is the folded graph's, with the exact new weights: a region. They must be equal. When the outputs
of both graphs are found equal in this way, the fold is proved for all inputs of the model, and no more than the weights
of one region were needed at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from peftgraph.folding.engine import Folding
from peftgraph.folding.exact_values import ExactValues
from peftgraph.folding.proof_error import ProofError
from peftgraph.folding.region_inputs import RegionInputs, Unusable
from peftgraph.folding.replaced_values import ReplacedValues
from peftgraph.folding.steps import AcceptTrained
from peftgraph.folding.wide_products import Exact, Stored, compute, whole
from peftgraph.ir.dead_code import writes_in_place
from peftgraph.ir.dtype_literals import widen_literals
from peftgraph.ir.interpreter import MATRIX_PRODUCTS
from peftgraph.ir.modes import BATCH_STATISTICS, evaluation_graph
from peftgraph.ir.program import ProgramData
from peftgraph.sites.dataflow import ops

aten = torch.ops.aten
MOVING = ops.LAYOUT | ops.CAST | ops.DROPOUT
EPSILON = torch.finfo(torch.float64).eps
LOOKUPS = {aten.embedding.default: (0, 1)}


@dataclass(frozen=True)
class RegionProof:
    """What was proved region by region.

    Attributes:
        regions: how many.
        error: the largest relative difference in float64.
        bound: on the error, of the region that came closest to it.
        change: the smallest relative change of a region's value that the fold makes; None where none is known.
    """

    regions: int
    error: float
    bound: float
    change: float | None

    def __str__(self) -> str:
        seen = "" if self.change is None else f"; the folds change these values by {self.change:.1e} or more"
        return (
            f"{self.regions} compute the same in float64, on random inputs: relative difference {self.error:.1e}, "
            f"bound {self.bound:.1e}{seen}"
        )


@dataclass(frozen=True)
class _Region:
    error: float
    bound: float
    change: float | None


def prove_regions(
    program: ProgramData, folding: Folding, folded: ProgramData, exact: Mapping[str, ExactValues]
) -> RegionProof | str:
    """Prove that both programs compute the same in evaluation; or return why no regions could be found.

    Args:
        program: before the fold.
        folding: the run that folded it.
        folded: its result.
        exact: the exact new values, by tensor.

    Raises:
        ProofError: a region computes something else after the fold.
    """
    graphs = evaluation_graph(program.graph), evaluation_graph(folded.graph)
    for graph in graphs:
        widen_literals(graph)
    reason = ""
    for few in (True, False):
        try:
            found = _Walk(program, folding, folded, exact, *graphs, few).run()
        except (Unusable, RuntimeError, IndexError) as error:  # of an operator that takes no such random values
            reason = str(error).partition("\n")[0]
        else:
            worst = max(found, key=lambda one: one.error / one.bound, default=_Region(0.0, 0.0, None))
            changes = [one.change for one in found if one.change]
            return RegionProof(len(found), worst.error, worst.bound, min(changes, default=None))
    return reason


class _Walk:
    """One walk over the two graphs."""

    def __init__(
        self,
        program: ProgramData,
        folding: Folding,
        folded: ProgramData,
        exact: Mapping[str, ExactValues],
        adapted_graph: fx.Graph,
        folded_graph: fx.Graph,
        few: bool,
    ) -> None:
        self._program, self._folded, self._folding, self._exact = program, folded, folding, exact
        self._graph = folded_graph
        self._adapted = {node.name: node for node in adapted_graph.nodes}
        self._outputs = folded_graph.output_node(), adapted_graph.output_node()
        self._same: dict[fx.Node, fx.Node] = {}  # node of the folded graph -> of the adapted one, of equal value
        self._agreed: set[fx.Node] = set()
        self._values: dict[fx.Node, Any] = {}  # of the region at hand
        self._inputs = RegionInputs(program, folding.trained_rows, few)
        self._looked_up = _lookups(adapted_graph) | _lookups(folded_graph)
        self._constant: set[fx.Node] = _constants(adapted_graph) | _constants(folded_graph)
        self._entering: dict[fx.Node, Tensor | None] = {}
        self._together = False
        self._replaced = ReplacedValues(folding)
        self._found: list[_Region] = []

    def run(self) -> list[_Region]:
        """Walk; return the regions.

        Raises:
            ProofError: a region computes something else after the fold.
            Unusable: there are values that no region covers.
        """
        with torch.no_grad():
            for node in self._graph.nodes:
                twin = None if node.op == "output" else self._twin(node)
                if twin is not None:
                    self._same[node] = twin
                    self._agreed.add(twin)
        after, before = self._outputs
        if not self._is_same_call(after, before):
            raise Unusable("outputs depend on changed weights outside of all regions")
        return self._found

    def _twin(self, node: fx.Node) -> fx.Node | None:
        """Return the node of the adapted graph with the same value; None where there is none."""
        own, name = self._adapted.get(node.name), self._replaced.values.get(node.name)
        if name is not None and name in self._adapted and self._is_whole(node):
            twin = self._adapted[name]
            self._prove(node, twin)
            return twin
        if node.op == "get_attr":
            return self._stored_twin(node, own)
        if node.op == "placeholder":
            return own
        if own is not None and self._is_same_call(node, own):
            return own
        return own if own is not None and self._is_untouched(node, own) else None

    def _is_whole(self, node: fx.Node) -> bool:
        """Check whether nothing but what was put in the place of a stored tensor changes it."""
        if node.op != "get_attr" or str(node.target) not in self._exact:
            return True
        return self._replaced.is_at_weight(self._exact[str(node.target)].component)

    def _stored_twin(self, node: fx.Node, own: fx.Node | None) -> fx.Node | None:
        """Return the node that reads the same stored values; a tensor that no fold changes is read anywhere alike."""
        name = str(node.target)
        if name not in self._exact:
            stored = self._program.table[name].tensor is self._folded.table[name].tensor
            return (own or node) if stored else None
        accepted = all(isinstance(step, AcceptTrained) for step in self._exact[name].component.steps)
        return own if accepted else None

    def _is_same_call(self, node: fx.Node, other: fx.Node) -> bool:
        """Check whether a node of the folded graph is the same call, of equal values, as one of the adapted graph."""
        if node.target != other.target or _writes(node) != _writes(other):
            return False
        if any(operand not in self._same for operand in node.all_input_nodes):
            return False
        mine = map_arg((node.args, node.kwargs), self._same.__getitem__)
        return mine == (other.args, other.kwargs)

    def _is_untouched(self, node: fx.Node, own: fx.Node) -> bool:
        """Check whether a value reads only those values of changed tensors that no fold wrote."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or node in self._constant:
            return False
        read = {name for name in self._changed(node) if any(v.window is not None for v in self._folding.changed[name])}
        if not read:
            return False
        _, error, bound = self._compare(node, own)
        return error <= bound

    def _changed(self, node: fx.Node) -> set[str]:
        """Return the changed tensors that a value is computed from since the last equal one."""
        return {str(one.target) for one in self._cone(node) if one.op == "get_attr" and str(one.target) in self._exact}

    def _cone(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes that a value is computed from within its region."""
        seen: set[fx.Node] = set()
        todo = [node]
        while todo:
            one = todo.pop()
            if one not in seen and one not in self._same and one not in self._agreed:
                seen.add(one)
                todo += one.all_input_nodes
        return seen

    # One region.

    def _prove(self, node: fx.Node, twin: fx.Node) -> None:
        """Check that two values are equal.

        Raises:
            ProofError: they are not.
        """
        change, error, bound = self._compare(node, twin)
        if not error <= bound:
            self._together = True  # perhaps it holds only for values that enter together, as the model computes them
            change, error, bound = self._compare(node, twin)
            self._together = False
        if not error <= bound:
            raise ProofError(
                f"At %{node.meta.get('label', node.name)} the folded weights and the passes differ by {error:.1e} in "
                f"float64, on random inputs; {bound:.1e} is allowed."
            )
        self._found.append(_Region(error, bound, change))

    def _compare(self, node: fx.Node, twin: fx.Node) -> tuple[float | None, float, float]:
        """Return how much the fold changes a value, the relative difference between both graphs, and its bound."""
        cone = self._cone(node) | self._cone(twin)
        writer = next((one for one in cone if _writes(one)), None)
        if writer is not None:
            raise Unusable(f"%{writer.name} writes in place")
        before, after = whole(self._value(twin)), whole(self._value(node))
        own = self._values.get(self._adapted.get(node.name, node))
        self._values.clear()
        for name in {str(one.target) for one in cone if one.op == "get_attr"} & self._exact.keys():
            self._exact[name].release()
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
            return None, math.inf, 0.0
        products = sum(ops.name(one) in MATRIX_PRODUCTS for one in cone)
        bound = 64 * EPSILON * math.sqrt(max(1, products))
        change = _difference(before, own) if isinstance(own, Tensor) and own.shape == before.shape else None
        return change, _difference(before, after), bound

    def _value(self, wanted: fx.Node) -> Any:
        """Return a value of the region at hand."""
        todo = [wanted]
        while todo:
            node = todo[-1]
            if node not in self._values:
                source = self._source(node)
                missing = [one for one in source if one not in self._values]
                if missing:
                    todo += missing
                    continue
                self._values[node] = self._computed(node)
            todo.pop()
        return self._values[wanted]

    def _source(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values one is computed from."""
        twin = self._same.get(node)
        if twin is not None and twin is not node:
            return [twin]
        return [] if self._enters(node) else node.all_input_nodes

    def _computed(self, node: fx.Node) -> Any:
        twin = self._same.get(node)
        if twin is not None and twin is not node:
            return self._values[twin]
        if self._enters(node):
            return self._entering[node]
        if node.op == "get_attr":
            return self._stored(node)
        if node.op == "placeholder":
            return self._inputs.given(node)
        return compute(node, self._values.__getitem__)

    def _enters(self, node: fx.Node) -> bool:
        """Check whether random numbers take the place of a value that enters a region; those that only move others are
        computed from them, since a region may read both."""
        if self._together or node.op == "get_attr" or not (node in self._same or node in self._agreed):
            return False
        if node not in self._entering:
            self._entering[node] = self._random(node)
        return self._entering[node] is not None

    def _random(self, node: fx.Node) -> Tensor | None:
        """Return random numbers for a value that enters a region; None where it must be computed."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node in self._constant:
            return None
        if node in self._looked_up:
            return self._inputs.numbers(value, self._looked_up[node])
        return None if ops.name(node) in MOVING else self._inputs.random(value)

    def _stored(self, node: fx.Node) -> Any:
        name = str(node.target)
        if node.graph is self._graph and name in self._exact and node not in self._same:
            return Exact(self._exact[name], name)
        table = self._folded.table if node.graph is self._graph else self._program.table
        return Stored(table[name].tensor.detach().to(self._program.table.device))


def _writes(node: fx.Node) -> bool:
    """Check whether a node of a graph of evaluation writes into an operand; there, norms only read their statistics."""
    return writes_in_place(node) and node.target not in BATCH_STATISTICS


def _lookups(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the inputs by which rows are looked up in tables, with the fewest rows of these tables."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.target in LOOKUPS:
            table, numbers = (node.args[position] for position in LOOKUPS[node.target])
            size = table.meta["val"].shape[0]
            if isinstance(size, int) and _is_given(numbers):
                found[numbers] = min(size, found.get(numbers, size))
    return found


def _is_given(value: fx.Node) -> bool:
    """Check whether a value is an input of the graph, whatever moved it."""
    while ops.name(value) in MOVING and len(value.all_input_nodes) == 1:
        (value,) = value.all_input_nodes
    return value.op == "placeholder"


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on stored tensors and on sizes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        called = node.op == "call_function" and all(operand in found for operand in node.all_input_nodes)
        if node.op == "get_attr" or called or isinstance(node.meta.get("val"), torch.SymInt):
            found.add(node)
    return found


def _difference(x: Tensor, y: Tensor) -> float:
    """Return the largest difference over the largest magnitude, where both are finite; infinite where only one is."""
    finite = torch.isfinite(x) & torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
        return math.inf
    if not bool(finite.all()):
        x, y = x[finite], y[finite]
    if not x.numel():
        raise Unusable("no value of a region is finite")
    if not x.is_floating_point():
        return 0.0 if torch.equal(x, y) else math.inf
    return float((x - y).abs().max() / x.abs().max().clamp_min(1e-300))
