"""The calling convention that follows from a base's and from its edits: inputs and outputs behind the model's own.

An edit records what it keeps in the cache of keys and values (`Edit.cached`), and the inputs that it reads beside the
model's own (`Edit.inputs`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from peftgraph.errors import PeftGraphError
from peftgraph.ir.added_inputs import inputs_of, with_added_input
from peftgraph.ir.graphs import find_node
from peftgraph.ir.modes import SEQUENCE_AXIS
from peftgraph.ir.ordering import in_canonical_order
from peftgraph.ir.program import ProgramData
from peftgraph.ir.signature import InputSpec, Signature

P = TypeVar("P", bound=ProgramData)


def with_inputs_of_edits(program: P) -> P:
    """Return the program with the calling convention of its base, the layers that its edits keep in the cache, and the
    inputs that they read beside the model's own; its graph is changed in place.

    Raises:
        PeftGraphError: the edits keep an odd number of values.
    """
    base = program.base or program
    own = {spec.name for spec in base.signature.inputs}
    inputs = [one for one in inputs_of(program.edits) if one.name not in own]
    same = len(program.signature.inputs) == len(base.signature.inputs)
    if same and not inputs and not any(edit.cached for edit in program.edits):
        return program
    read = {one.name for one in inputs} | {one.input for edit in program.edits for one in edit.cached}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in own | read:
            program.graph.erase_node(node)
    sizes = {"ranges": program.signature.ranges, "conditions": program.signature.conditions}
    program = program.evolve(signature=replace(base.signature, **sizes), example=base.example)
    program = _with_cache_layers(program, base)
    for i, one in enumerate(inputs):
        find_node(program.graph, one.name).meta["order"] = (0, len(program.signature.inputs) + i)
        program = with_added_input(program, one)
    return program.evolve(graph=in_canonical_order(program.graph))


def _with_cache_layers(program: P, base: ProgramData) -> P:
    """Return a program that has its base's calling convention with the layers that its edits keep in the cache."""
    place = {spec.name: i for i, spec in enumerate(base.signature.inputs)}  # keys come before values, as in the model
    added = [one for edit in program.edits for one in sorted(edit.cached, key=lambda one: place[one.like])]
    if not added:
        return program
    if len(added) % 2:
        method = program.history[-1].method
        raise PeftGraphError(f"{method} keeps {len(added)} values in the cache, which holds pairs of keys and values.")
    nodes = {node.name: node for node in program.graph.nodes}
    own = {spec.name: spec for spec in base.signature.inputs}
    keys = (f"{own[one.like].argument}[{len(base.signature.cache_inputs) + i}]" for i, one in enumerate(added))
    specs = [_spec(nodes[one.input], own[one.like], key) for one, key in zip(added, keys, strict=True)]
    for i, spec in enumerate(specs):
        nodes[spec.name].meta |= {"label": spec.key, "default": None, "order": (0, i)}  # behind the model's own
    signature, order = _extended(program.signature, specs)
    drop_outputs(program.graph, {one.output for one in added})
    output = program.graph.output_node()
    leaves = [*_leaves(output), *(nodes[one.output] for one in added)]
    output.args = ([leaves[i] for i in order],)
    examples = base.examples
    more = (_example(examples[one.like], nodes[one.input]) for one in added)
    return program.evolve(signature=signature, example=(*base.example, *more))


def drop_outputs(graph: fx.Graph, names: Collection[str]) -> None:
    """Take values out of the outputs of a graph, in place."""
    output = graph.output_node()
    output.args = ([leaf for leaf in _leaves(output) if not (isinstance(leaf, fx.Node) and leaf.name in names)],)


def _leaves(output: fx.Node) -> list[Any]:
    leaves = output.args[0]
    assert isinstance(leaves, list | tuple)
    return list(leaves)


def _spec(node: fx.Node, like: InputSpec, key: str) -> InputSpec:
    """Describe an input of earlier rows: its batch and its number of rows are those of one of the model's own."""
    shape = node.meta["val"].shape
    dims = (like.dims[0], int(shape[1]), like.dims[SEQUENCE_AXIS], int(shape[3]))
    return replace(like, name=node.name, key=key, dtype=node.meta["val"].dtype, dims=dims)


def _example(like: Tensor, node: fx.Node) -> Tensor:
    """Return random earlier rows for the traced call."""
    value = node.meta["val"]
    sizes = (like.shape[0], int(value.shape[1]), like.shape[SEQUENCE_AXIS], int(value.shape[3]))
    if like.is_meta:
        return like.new_empty(sizes, dtype=value.dtype)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(like.device, value.dtype)


def _extended(signature: Signature, specs: Sequence[InputSpec]) -> tuple[Signature, list[int]]:
    """Return a signature with more inputs and outputs in the cache, and where its outputs are among those of before and
    the new ones."""
    cache = signature.kv_cache
    assert cache is not None, "a program without a cache has no rows of earlier calls"
    count = len(signature.output_keys)
    tree = pytree.tree_unflatten(list(range(count)), signature.outputs)
    tree[cache.argument] = (*tree[cache.argument], *range(count, count + len(specs)))
    order, outputs = pytree.tree_flatten(tree)
    keys = (*signature.output_keys, *(spec.key for spec in specs))
    start = max(cache.layers) + 1
    layers = (*cache.layers, *range(start, start + len(specs) // 2))
    return replace(
        signature,
        inputs=(*signature.inputs, *specs),
        outputs=outputs,
        output_keys=tuple(keys[i] for i in order),
        kv_cache=replace(cache, layers=layers),
    ), order
