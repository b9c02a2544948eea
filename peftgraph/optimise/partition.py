"""Cuts a joint graph into the graph of the forward pass and that of the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from peftgraph.optimise.joint_graph import JointGraph
from peftgraph.optimise.seeded_dropout import SEEDED_NOISE, first_noise, repeated_noise


class Parts:
    """The nodes of a joint graph by the pass that they belong to.

    Attributes:
        inputs: of the forward pass.
        stored: those of them that are stored tensors.
        tangents: the gradients by the outputs.
        outputs: of the forward pass.
        gradients: by the inputs.
        forward: the nodes that no gradient is needed for, in order.
        members: the same, as a set.
        backward: all others, in order.
        read_by_backward: the nodes of the forward pass that the backward pass reads.
    """

    def __init__(self, joint: JointGraph) -> None:
        nodes = list(joint.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        leaves: Any = joint.graph.output_node().args[0]
        self.inputs, self.tangents = placeholders[: joint.inputs], placeholders[joint.inputs :]
        self.stored = set(self.inputs[: joint.stored])
        self.outputs, self.gradients = list(leaves[: joint.outputs]), list(leaves[joint.outputs :])
        later = set(self.tangents)
        for node in nodes:
            if node.op == "call_function" and not later.isdisjoint(node.all_input_nodes):
                later.add(node)
        self.backward = [node for node in nodes if node in later]
        self.forward = [node for node in nodes if node.op != "output" and node not in later]
        self.members = set(self.forward)
        self.read_by_backward = [
            node for node in self.forward if any(user in later for user in node.users) or node in self.gradients
        ]

    def needed(self, roots: Iterable[fx.Node], known: Iterable[fx.Node]) -> set[fx.Node]:
        """Return the nodes from which `roots` are computed, back to those that are `known`."""
        stop, found, left = set(known), set[fx.Node](), list(roots)
        while left:
            node = left.pop()
            if node not in found and node not in stop:
                found.add(node)
                left += node.all_input_nodes
        return found


def forward_graph(parts: Parts, kept: Iterable[fx.Node]) -> fx.Graph:
    """Return the forward pass: its outputs, and then the values to keep that are not inputs."""
    made = [node for node in kept if node.op != "placeholder"]
    roots = [*(one for one in parts.outputs if isinstance(one, fx.Node)), *made]
    needed = parts.needed(roots, ())
    copy = _Copy()
    copy.placeholders(parts.inputs)
    for node in parts.forward:
        if node in needed and node.op != "placeholder":
            copy.node(node, first_noise)
    copy.graph.output([copy.of(one) for one in (*parts.outputs, *made)])
    return copy.graph


def backward_graph(parts: Parts, kept: Iterable[fx.Node]) -> fx.Graph:
    """Return the backward pass: it reads the kept values and the gradients by the outputs, and returns those by the
    inputs.

    What it computes again stands before its first reader, so that it is in memory for a short time.
    """
    copy = _Copy()
    copy.placeholders([*inputs_first(kept), *parts.tangents])
    for node in parts.backward:
        if node.op != "placeholder":
            copy.with_operands(node)
    for one in parts.gradients:
        copy.with_operands(one)
    copy.graph.output([copy.of(one) for one in parts.gradients])
    return copy.graph


def inputs_first(kept: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the kept values in the order in which the backward pass gets them."""
    return sorted(kept, key=lambda node: node.op != "placeholder")


class _Copy:
    """A graph that is made of nodes of another one."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}

    def placeholders(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self.made[node] = self.graph.placeholder(node.name)
            self.made[node].meta = dict(node.meta)

    def node(self, node: fx.Node, noise: Any) -> None:
        new = self.graph.create_node(
            node.op,
            noise if node.target is SEEDED_NOISE else node.target,
            map_arg(node.args, self.made.__getitem__),
            map_arg(node.kwargs, self.made.__getitem__),
            name=node.name,
        )
        new.meta = dict(node.meta)
        self.made[node] = new

    def with_operands(self, node: Any) -> None:
        """Copy a node after the operands that are not yet there."""
        left = [node] if isinstance(node, fx.Node) else []
        while left:
            missing = [one for one in left[-1].all_input_nodes if one not in self.made]
            if missing:
                left += missing
            elif (done := left.pop()) not in self.made:
                self.node(done, repeated_noise)

    def of(self, value: Any) -> Any:
        return self.made[value] if isinstance(value, fx.Node) else value
