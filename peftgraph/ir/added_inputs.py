"""Inputs that passes add to a model: a placeholder behind the model's own, and its place in the calling convention."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from keyword import iskeyword
from typing import TypeVar

import torch
from torch import Tensor, fx

from peftgraph.errors import Conflict, PeftGraphError, RecipeError
from peftgraph.ir.edits import AddedInput, Edit
from peftgraph.ir.program import ProgramData
from peftgraph.ir.shape_inference import fake_mode_of
from peftgraph.ir.signature import InputSpec, Signature

P = TypeVar("P", bound=ProgramData)


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
        RecipeError: the name cannot be that of an argument, or the model has no size of a name.
    """
    taken = {spec.argument for spec in signature.inputs} | set(signature.forward.parameters)
    nodes = {node.name: node for node in graph.nodes}
    if added.name in taken or added.name in nodes:
        raise Conflict(f"The model has an input {added.name!r} of its own.")
    if not added.name.isidentifier() or iskeyword(added.name) or added.name in dir(builtins):
        raise RecipeError(f"An input cannot be called {added.name!r}; choose a name such as 'task_ids'.")
    sizes = {
        dim: size
        for spec in signature.inputs
        for dim, size in zip(spec.dims, nodes[spec.name].meta["val"].shape, strict=True)
    }
    unknown = next((dim for dim in added.dims if isinstance(dim, str) and dim not in sizes), None)
    if unknown is not None:
        known = ", ".join(dim for dim in sizes if isinstance(dim, str)) or "none"
        raise RecipeError(
            f"The input {added.name!r} has a size {unknown!r}; the free sizes of this program are: {known}."
        )
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        new = graph.create_node("placeholder", added.name, name=added.name)
    with fake_mode_of(graph):
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in added.dims]
        new.meta["val"] = torch.empty(shape, dtype=added.dtype, device=last.meta["val"].device)
    new.meta |= {"label": added.name, "default": None, "order": (0, len(nodes))}
    return new


def with_added_input(program: P, added: AddedInput, example: Tensor | None = None) -> P:
    """Return a program, whose graph has the placeholder, with its calling convention.

    Args:
        program: with the placeholder.
        added: the input.
        example: of the traced call; by default, what a call has that omits it, or zeros.
    """
    signature = program.signature
    spec = InputSpec(
        added.name, added.name, added.name, added.dtype, added.dims, added.fill is not None, None, {}, added.fill, True
    )
    forward = with_keyword(signature.forward, added.name, None if added.fill is not None else inspect.Parameter.empty)
    example = _example(program, added) if example is None else example
    return program.evolve(
        signature=replace(signature, inputs=(*signature.inputs, spec), forward=forward),
        example=(*program.example, example),
    )


def _example(program: ProgramData, added: AddedInput) -> Tensor:
    pairs = zip(program.signature.inputs, program.example, strict=True)
    sizes = {dim: n for spec, value in pairs for dim, n in zip(spec.dims, value.shape, strict=True)}
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in added.dims]
    return torch.full(shape, added.fill or 0, dtype=added.dtype, device=program.example[0].device)


def inputs_of(edits: Iterable[Edit]) -> list[AddedInput]:
    """Return the inputs beside the model's own that edits read, each once, in the order in which they came."""
    return list(dict.fromkeys(one for edit in edits for one in edit.inputs))


def with_keyword(forward: inspect.Signature, name: str, default: object) -> inspect.Signature:
    """Return a signature with one more keyword argument, before `**kwargs`."""
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    known: Sequence[inspect.Parameter] = list(forward.parameters.values())
    last = [one for one in known if one.kind is inspect.Parameter.VAR_KEYWORD]
    return forward.replace(parameters=[*(one for one in known if one not in last), parameter, *last])
