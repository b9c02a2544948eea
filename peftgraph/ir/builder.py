"""The builder: the only place that makes, redirects and erases nodes of a program's graph.

It sets the value metadata and the origin of every node it makes and counts what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftgraph.errors import Conflict
from peftgraph.ir.propagate import fake_like, fake_mode_of, value_of
from peftgraph.ir.table import Entry

aten = torch.ops.aten

Initializer = Callable[[Tensor], Any]
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
    "sigmoid": aten.sigmoid.default,
}


@dataclass
class Builder:
    """Builds one edit in `graph`, inserting after `cursor`.

    Attributes:
        graph: a copy of a program's graph, owned by the caller.
        label: the prefix of the printed names of new nodes, such as `0.attention.q.lora`.
        owner: the dotted prefix of new parameters, such as `layers.0.self_attn.q_proj`.
        dtype, device: of new parameters.
        taken: the names already in use, and who made them.
        maker: the spec of the pass that builds.
        order: the `meta["order"]` that those of new nodes begin with.
        cursor: new nodes go after it.
    """

    graph: fx.Graph
    label: str
    owner: str
    dtype: torch.dtype
    device: torch.device
    taken: dict[str, str]
    maker: str
    order: tuple[int, ...]
    cursor: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mode = fake_mode_of(self.graph)

    # parameters

    def param(self, name: str, shape: Sequence[int], init: Initializer) -> fx.Node:
        """A new trainable parameter `owner.name`, filled in place by `init`.

        Raises:
            Conflict: the name is taken.
        """
        full = f"{self.owner}.{name}"
        if full in self.taken:
            raise Conflict(
                f"{self.maker} would make the parameter {full}, which exists already (made by {self.taken[full]}). Two "
                'adapters at one site need names of their own: name="...".'
            )
        value = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
        if self.device.type != "meta":
            with torch.no_grad():
                init(value)
        self.taken[full] = self.maker
        parameter = nn.Parameter(value)
        self.entries[full] = Entry(parameter, "parameter", trainable=True, added=True)
        return self._insert("get_attr", full, (), {}, name, fake_like(self._mode, parameter))

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A non-persistent buffer `owner.name`, such as an index table; equal ones of the same name are shared."""
        full = f"{self.owner}.{name}"
        if full not in self.taken:
            self.taken[full] = self.maker
            self.entries[full] = Entry(value.to(self.device), "buffer", persistent=False, added=True)
        return self._insert("get_attr", full, (), {}, name, fake_like(self._mode, value.to(self.device)))

    # computation

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls an aten overload; its value is inferred under fake tensors."""
        return self._insert("call_function", target, args, kwargs, _opname(target), None)

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """x (..., I) with weight (O, I), bias (O) -> (..., O)."""
        return self.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))

    def dropout(self, x: fx.Node, p: float) -> fx.Node:
        """Dropout that follows train() and eval(); p = 0 adds nothing."""
        return x if p == 0 else self.call(aten.dropout.default, x, p, True)

    def activation(self, name: str, x: fx.Node) -> fx.Node:
        """An elementwise nonlinearity by its name in `ACTIVATIONS`."""
        return self.call(ACTIVATIONS[name], x)

    def mul(self, x: fx.Node, y: fx.Node | float) -> fx.Node:
        """x * y; a factor of exactly 1 adds nothing."""
        if isinstance(y, fx.Node):
            return self.call(aten.mul.Tensor, x, y)
        return x if y == 1 else self.call(aten.mul.Tensor, x, y)

    def add(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """x + y."""
        return self.call(aten.add.Tensor, x, y)

    # structure

    def redirect(self, old: fx.Node, new: fx.Node, keep: set[fx.Node]) -> int:
        """Moves the uses of `old` to `new`, except in `keep`; returns how many moved."""
        users = [user for user in old.users if user not in keep]
        for user in users:
            user.replace_input_with(old, new)
        return len(users)

    def _insert(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hint: str, value: Any
    ) -> fx.Node:
        with self.graph.inserting_after(self.cursor):
            node = self.graph.create_node(op, target, args, kwargs, name=f"{self.label}_{hint}".replace(".", "_"))
        node.meta["val"] = value_of(self._mode, node) if value is None else value
        node.meta["label"] = self._unique_label(hint)
        node.meta["origin"] = self.label
        node.meta["order"] = (*self.order, len(self.nodes))
        self.cursor = node
        self.nodes.append(node)
        return node

    def _unique_label(self, hint: str) -> str:
        base = f"{self.label}.{hint}"
        count = sum(node.meta["label"].rsplit("#", 1)[0] == base for node in self.nodes)
        return base if count == 0 else f"{base}#{count + 1}"


def erase(graph: fx.Graph, names: Sequence[str]) -> None:
    """Erases nodes that nothing outside `names` uses."""
    doomed = set(names)
    for node in reversed(list(graph.nodes)):
        if node.name in doomed:
            graph.erase_node(node)


def sort(graph: fx.Graph) -> fx.Graph:
    """The graph in canonical order: operands before users and, among what is possible, by each node's `meta["order"]`.

    Base nodes carry their position in the traced graph and new ones the position they were inserted after, so the order
    does not depend on the way there: taking a pass out restores the base's own order.
    """
    import networkx as nx  # here and not above: importing peftgraph stays light

    uses = nx.DiGraph()
    uses.add_nodes_from(graph.nodes)
    uses.add_edges_from((operand, node) for node in graph.nodes for operand in node.all_input_nodes)
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in nx.lexicographical_topological_sort(uses, key=lambda node: node.meta["order"]):
        mapped[node] = new.node_copy(node, lambda operand: mapped[operand])
        mapped[node].meta = dict(node.meta)
    return new


def number(graph: fx.Graph) -> None:
    """Records the order of a base graph's nodes, in place."""
    last = len(graph.nodes)
    for i, node in enumerate(graph.nodes):
        node.meta["order"] = (0 if node.op == "placeholder" else last if node.op == "output" else i,)


def _opname(target: Callable[..., Any]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].strip("_")
    return getattr(target, "__name__", str(target))
