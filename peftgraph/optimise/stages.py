"""Cuts an evaluation graph into what stored tensors alone determine, what sizes determine, and the rest.

The first part runs once, until a stored tensor changes; the second once for each combination of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx

from peftgraph.optimise.clean_up import is_random, value_of

aten = torch.ops.aten


class Stage(IntEnum):
    """What a value depends on; each stage may read the ones before it."""

    STORED = 0
    SIZES = 1
    VALUES = 2


@dataclass(frozen=True)
class Part:
    """A part of a graph.

    Attributes:
        graph: its placeholders are `reads`, then the inputs of the whole graph if it is the last part.
        reads: the names of stored tensors, of sizes, and of values that earlier parts compute.
        makes: the names of the values that it computes, in the order of its outputs.
    """

    graph: fx.Graph
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass(frozen=True)
class StagedGraph:
    """The parts of a graph.

    Attributes:
        sources: the stored tensors by the name under which parts read them.
        sizes: by name, the input and the axis that have each size.
        masks: values of the sizes that nothing reads but attentions, as the mask of what each query may see.
    """

    stored: Part
    sized: Part
    rest: Part
    sources: Mapping[str, str]
    sizes: Mapping[str, tuple[int, int]]
    masks: frozenset[str]


def stages_of(graph: fx.Graph) -> dict[fx.Node, Stage]:
    """Return the stage of every node except the output."""
    found: dict[fx.Node, Stage] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder" or is_random(node):
            found[node] = Stage.VALUES
        elif node.op == "get_attr":
            found[node] = Stage.STORED
        elif _is_input_size(node):
            found[node] = Stage.SIZES
        else:
            found[node] = max((found[one] for one in node.all_input_nodes), default=Stage.STORED)
    return found


def _is_input_size(node: fx.Node) -> bool:
    source = node.args[0] if node.target is aten.sym_size.int else None
    return isinstance(source, fx.Node) and source.op == "placeholder"


def read_input_sizes(graph: fx.Graph) -> None:
    """Let every size be read from the first input that has it, in place."""
    known: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(size, int):
                known.setdefault(size.node.expr, (node, axis))
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        size = value_of(node)
        if not isinstance(size, int) and size.node.expr in known:
            node.args = known[size.node.expr]


def stored_first(graph: fx.Graph) -> None:
    """Move all that stored tensors alone determine above the rest, in place."""
    stages = stages_of(graph)
    last: fx.Node | None = None
    for node in [node for node in graph.nodes if stages.get(node) is Stage.STORED]:
        if last is None:
            first = next(iter(graph.nodes))
            if node is not first:
                first.prepend(node)
        else:
            last.append(node)
        last = node


def cut_into_stages(graph: fx.Graph) -> StagedGraph:
    """Return the parts of a graph that writes into nothing; `graph` is unchanged."""
    stages = stages_of(graph)
    inputs = graph.find_nodes(op="placeholder")
    place = {node: i for i, node in enumerate(inputs)}
    sizes: dict[str, tuple[int, int]] = {}
    for node in stages:
        if _is_input_size(node):
            source, axis = node.args
            sizes[node.name] = (place[source], axis)  # pyright: ignore[reportArgumentType]
    parts = {stage: _part(graph, stages, stage) for stage in Stage}
    sources = {node.name: str(node.target) for node in graph.find_nodes(op="get_attr")}
    masks = frozenset(node.name for node in stages if stages[node] is Stage.SIZES and _is_only_a_mask(node))
    return StagedGraph(parts[Stage.STORED], parts[Stage.SIZES], parts[Stage.VALUES], sources, sizes, masks)


def _is_only_a_mask(node: fx.Node) -> bool:
    attention = aten.scaled_dot_product_attention.default
    return bool(node.users) and all(
        user.target is attention
        and user.args.index(node) == 3
        and len(user.args) < 6
        and not user.kwargs.get("is_causal")
        and user.all_input_nodes.count(node) == 1
        for user in node.users
        if node in user.args or user.target is not attention
    )


def _part(graph: fx.Graph, stages: Mapping[fx.Node, Stage], stage: Stage) -> Part:
    """Return the calls of one stage as a graph of its own."""
    inside = [node for node in stages if stages[node] is stage and node.op == "call_function"]
    inside = [node for node in inside if not _is_input_size(node)]
    output = graph.output_node()
    readers: list[fx.Node] = [*inside, output] if stage is Stage.VALUES else inside
    mine = set(inside)
    outside = dict.fromkeys(o for node in readers for o in node.all_input_nodes if o not in mine)
    reads = [node for node in outside if node.op != "placeholder"]
    new = fx.Graph()
    made = {node: _input(new, node) for node in reads}
    if stage is Stage.VALUES:
        made |= {node: _input(new, node) for node in graph.find_nodes(op="placeholder")}
    for node in inside:
        made[node] = new.node_copy(node, made.__getitem__)
    makes = [node for node in inside if any(stages.get(user, Stage.VALUES) > stage for user in node.users)]
    if stage is Stage.VALUES:
        new.output([_copied(new, leaf, made, stages) for leaf in _leaves(output)])
    else:
        new.output([made[node] for node in makes])
    return Part(new, tuple(node.name for node in reads), tuple(node.name for node in makes))


def _input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = graph.placeholder(node.name)
    new.meta = dict(node.meta)
    return new


def _leaves(output: fx.Node) -> list[Any]:
    leaves = output.args[0]
    assert isinstance(leaves, list | tuple)
    return list(leaves)


def _copied(graph: fx.Graph, leaf: Any, made: Mapping[fx.Node, fx.Node], stages: Mapping[fx.Node, Stage]) -> Any:
    """Return an output: of what is kept for later calls a copy, since the caller may write into it."""
    if not isinstance(leaf, fx.Node):
        return leaf
    if stages[leaf] is Stage.VALUES or leaf.op == "get_attr" or not isinstance(leaf.meta["val"], Tensor):
        return made[leaf]
    return graph.call_function(aten.clone.default, (made[leaf],))
