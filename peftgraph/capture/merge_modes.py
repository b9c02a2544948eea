"""One graph from two: what a model does in training and what it does in evaluation.

Dropout and the statistics of batch norm follow the mode by themselves. A model that does more in one mode (stochastic
depth, noise, another router) is traced in both. The two graphs are laid side by side in the order of their
operations; what stands in both is one, what stands in one is kept for that mode, and where an operation reads
different values in the two modes, `by_mode` chooses. How they are laid side by side decides how tidy the result is, not
what it computes: taking either side of every choice must give back that mode's graph, node by node, or the model is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from peftgraph.errors import TraceError
from peftgraph.ir.dead_code import live_nodes
from peftgraph.ir.graphs import call_nodes, copy_graph
from peftgraph.ir.modes import DROPOUTS, by_mode, evaluation_graph, training_graph


def merge_mode_graphs(training: fx.Graph, evaluation: fx.Graph, names: Mapping[str, str]) -> fx.Graph:
    """Return the graph that is `training` under train() and `evaluation` under eval().

    Args:
        training: as traced under train(), with dropout; unchanged.
        evaluation: as traced under eval(); unchanged.
        names: the stored tensors of `evaluation` whose name in the result is another one.

    Raises:
        TraceError: the result is not proven.
    """
    wanted = evaluation_graph(evaluation)
    work = _Merge(copy_graph(training), names)
    work.align(evaluation_graph(training), wanted)
    work.place(wanted)
    work.sweep()
    if not _same(evaluation_graph(work.graph), wanted, names) or not _same(training_graph(work.graph), training, {}):
        raise TraceError(
            "The model's code runs differently in training and in evaluation, and the two cannot be told apart "
            "operation by operation. Trace a part of the model that does not."
        )
    return work.graph


@dataclass
class _Merge:
    """The work on `graph`, which is training's and becomes the one for both.

    Attributes:
        partner: for a node of evaluation, the node of training that is the same operation.
        value: for a node of evaluation, the node of the result.
        shared: the nodes of training that run in both modes.
    """

    graph: fx.Graph
    names: Mapping[str, str]
    partner: dict[fx.Node, fx.Node] = field(default_factory=dict)
    value: dict[fx.Node, fx.Node] = field(default_factory=dict)
    choices: dict[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)
    shared: set[fx.Node] = field(default_factory=set)
    only: set[fx.Node] = field(default_factory=set)

    def align(self, training: fx.Graph, evaluation: fx.Graph) -> None:
        """Lay the operations of both modes side by side."""
        by_name = {node.name: node for node in self.graph.nodes}
        ours, theirs = list(call_nodes(training)), list(call_nodes(evaluation))
        matcher = SequenceMatcher(None, [_key(n) for n in ours], [_key(n) for n in theirs], autojunk=False)
        for start, other, size in matcher.get_matching_blocks():
            for a, b in zip(ours[start : start + size], theirs[other : other + size], strict=True):
                self.partner[b] = by_name[a.name]
        kept = {by_name[node.name] for node in ours}
        # What evaluated() took out of training's own graph follows the mode by itself.
        self.shared = set(self.partner.values()) | {node for node in call_nodes(self.graph) if node not in kept}

    def place(self, evaluation: fx.Graph) -> None:
        """Give every value of evaluation a node in the result."""
        inputs = iter([node for node in self.graph.nodes if node.op == "placeholder"])
        todo = list(evaluation.nodes)
        for i, node in enumerate(todo):
            if node.op == "placeholder":
                self.value[node] = next(inputs)
            elif node.op == "get_attr":
                self.value[node] = self._fetch(node)
            elif node.op == "output":
                self._choose_operands(node, self.graph.output_node())
            elif node in self.partner:
                self._choose_operands(node, self.partner[node])
                self.value[node] = self.partner[node]
            else:
                self._add(node, next((self.partner[n] for n in todo[i:] if n in self.partner), None))

    def sweep(self) -> None:
        """Mark what runs in one mode only: a write into a stored tensor is alive in that mode alone."""
        for node in self.graph.nodes:
            if node.op != "call_function" or node in self.shared or node.target is by_mode:
                continue
            node.meta["evaluation_only" if node in self.only else "training_only"] = True

    def _fetch(self, node: fx.Node) -> fx.Node:
        target = self.names.get(str(node.target), str(node.target))
        for other in self.graph.nodes:
            if other.op == "get_attr" and other.target == target:
                return other
        first = next(other for other in self.graph.nodes if other.op != "placeholder")
        with self.graph.inserting_before(first):
            new = self.graph.create_node("get_attr", target, name=target.replace(".", "_"))
        new.meta = dict(node.meta)
        return new

    def _add(self, node: fx.Node, before: fx.Node | None) -> None:
        with self.graph.inserting_before(before or self.graph.output_node()):
            new = self.graph.node_copy(node, self.value.__getitem__)
        new.meta = dict(node.meta)
        self.value[node] = new
        self.only.add(new)

    def _choose_operands(self, node: fx.Node, ours: fx.Node) -> None:
        """Let `ours` read in evaluation what `node` reads."""
        wanted = iter(_operands(node))

        def choose(operand: fx.Node) -> fx.Node:
            value = self.value[next(wanted)]
            if _in_evaluation(operand) is _in_evaluation(value):
                return operand
            return self._choice(value, operand, ours)

        ours.args, ours.kwargs = map_arg((ours.args, ours.kwargs), choose)

    def _choice(self, value: fx.Node, operand: fx.Node, user: fx.Node) -> fx.Node:
        key = (value, operand)
        if key not in self.choices:
            with self.graph.inserting_before(user):
                new = self.graph.call_function(by_mode, key)
            new.meta = {k: v for k, v in operand.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
            self.choices[key] = new
        return self.choices[key]


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a node in the order of its arguments, repeated ones included."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _in_evaluation(node: fx.Node) -> fx.Node:
    """Return the node whose value this one is under eval()."""
    while node.target is by_mode or node.target in DROPOUTS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _key(node: fx.Node) -> str:
    """Return what two nodes of the same operation share: the operator, its literals, and the place in the model's
    code."""
    literals = map_arg((node.args, node.kwargs), lambda operand: "%")
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    line = [line for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    return f"{node.target} {literals} {stack[-1][0] if stack else ''} {line[-1] if line else ''}"


def _same(graph: fx.Graph, wanted: fx.Graph, names: Mapping[str, str]) -> bool:
    """Tell whether two graphs are equal, operation by operation, in order."""
    twin: dict[fx.Node, object] = {}
    for node in wanted.nodes:
        if node.op == "get_attr":
            twin[node] = names.get(str(node.target), str(node.target))
    ours = [node for node in live_nodes(graph) if node.op != "get_attr"]
    theirs = [node for node in live_nodes(wanted) if node.op != "get_attr"]
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a.op != b.op or (a.op == "call_function" and a.target != b.target):
            return False
        mine = map_arg((a.args, a.kwargs), lambda operand: operand)
        other = map_arg((b.args, b.kwargs), lambda operand: operand)
        if not _equal(mine, other, twin):
            return False
        twin[b] = a
    return True


def _equal(a: Any, b: Any, twin: Mapping[fx.Node, object]) -> bool:
    if isinstance(b, fx.Node):
        if not isinstance(a, fx.Node):
            return False
        return twin[b] == str(a.target) if b.op == "get_attr" else twin[b] is a
    if isinstance(b, list | tuple):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(lambda x, y: _equal(x, y, twin), a, b))
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key], twin) for key in b)
    if isinstance(b, slice):
        return isinstance(a, slice) and _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step), twin)
    return type(a) is type(b) and (a == b or (a != a and b != b))
