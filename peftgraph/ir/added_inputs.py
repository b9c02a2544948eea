"""Inputs that passes add to a model: a placeholder behind the model's own, and its place in the calling convention."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, fx

from peftgraph.errors import Conflict, PeftGraphError
from peftgraph.ir.program import ProgramData
from peftgraph.ir.shape_inference import fake_mode_of
from peftgraph.ir.signature import InputSpec, Signature

P = TypeVar("P", bound=ProgramData)


@dataclass(frozen=True)
class AddedInput:
    """Describes an input that is added to a model.

    Attributes:
        name: the keyword of calls, also of the graph's placeholder.
        dims: numbers, or names of sizes of the model's own inputs, such as "B".
        dtype: of its values.
        fill: the value of all its entries in a call that omits it; None: the call must give it.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype
    fill: float | None = None


def batch_dim(signature: Signature) -> str:
    """Return the name of the size of the batch: the first axis of the first input that is no cache.

    Raises:
        PeftGraphError: it is a number.
    """
    first = next(spec for spec in signature.inputs if spec.name not in signature.cache_inputs)
    dim = first.dims[0] if first.dims else 0
    if not isinstance(dim, str):
        raise PeftGraphError(
            f"The batch of this program has a fixed size ({first.key} has {dim} in dimension 0), so rows cannot differ."
        )
    return dim


def add_placeholder(graph: fx.Graph, signature: Signature, added: AddedInput) -> fx.Node:
    """Add the placeholder of an input to a graph, in place, after all others.

    Raises:
        Conflict: the model has an input of that name.
    """
    nodes = graph.find_nodes(op="placeholder")
    taken = {spec.argument for spec in signature.inputs} | set(signature.forward.parameters)
    if added.name in taken or any(node.name == added.name for node in graph.nodes):
        raise Conflict(f"The model has an input {added.name!r} of its own.")
    sizes = {
        dim: size
        for node, spec in zip(nodes, signature.inputs, strict=True)
        for dim, size in zip(spec.dims, node.meta["val"].shape, strict=True)
    }
    device = nodes[0].meta["val"].device
    with graph.inserting_after(nodes[-1]):
        new = graph.create_node("placeholder", added.name, name=added.name)
    with fake_mode_of(graph):
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in added.dims]
        new.meta["val"] = torch.empty(shape, dtype=added.dtype, device=device)
    new.meta |= {"label": added.name, "default": None, "order": (0, len(nodes))}
    return new


def with_added_input(program: P, added: AddedInput, example: Tensor) -> P:
    """Return a program, whose graph has the placeholder, with its calling convention and an example of it."""
    signature = program.signature
    spec = InputSpec(
        added.name, added.name, added.name, added.dtype, added.dims, added.fill is not None, None, {}, added.fill
    )
    forward = with_keyword(signature.forward, added.name, None if added.fill is not None else inspect.Parameter.empty)
    return program.evolve(
        signature=replace(signature, inputs=(*signature.inputs, spec), forward=forward),
        example=(*program.example, example),
    )


def with_keyword(forward: inspect.Signature, name: str, default: object) -> inspect.Signature:
    """Return a signature with one more keyword argument, before `**kwargs`."""
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    known: Sequence[inspect.Parameter] = list(forward.parameters.values())
    last = [one for one in known if one.kind is inspect.Parameter.VAR_KEYWORD]
    return forward.replace(parameters=[*(one for one in known if one not in last), parameter, *last])
