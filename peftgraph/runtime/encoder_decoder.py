"""Encoder-decoders in two graphs: what the encoder's inputs alone decide is computed once, the rest for every token.

The cut is by dataflow: it carries whatever the second graph reads from the first, such as the keys and values of every
cross-attention, with all that passes put on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftgraph.errors import CallError
from peftgraph.ir.dead_code import remove_dead_nodes
from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.modes import read_size_from
from peftgraph.ir.signature import Signature
from peftgraph.runtime.codegen import Code, compile_graph
from peftgraph.runtime.execution import build_outputs, without_missing_inputs

aten = torch.ops.aten
HIDDEN = "encoder_last_hidden_state"


@dataclass(frozen=True)
class EncoderDecoderGraphs:
    """A graph cut in two.

    Attributes:
        encoder: from the encoder's inputs to the values that are carried.
        decoder: from the other inputs, and after them the carried values, to the outputs.
        inputs: the names of the encoder's inputs, in order.
        batched: for each carried value, whether its first axis is the batch.
        hidden: which of them is the encoder's output.
    """

    encoder: fx.Graph
    decoder: fx.Graph
    inputs: tuple[str, ...]
    batched: tuple[bool, ...]
    hidden: int

    def carried(self, values: Sequence[Tensor], batch: int) -> list[Tensor]:
        """Return the carried values for a batch in which each example is repeated several times in a row, as for
        beams."""
        known = values[self.hidden].shape[0]
        if known == batch:
            return list(values)
        each = batch // known
        return [v.repeat_interleave(each, 0) if b else v for v, b in zip(values, self.batched, strict=True)]


def split_encoder_decoder(graph: fx.Graph, hidden: int) -> EncoderDecoderGraphs:
    """Split a graph in evaluation mode into encoder and decoder.

    Args:
        graph: the graph to split; unchanged.
        hidden: the output leaf that is the encoder's result; the inputs it depends on are the encoder's.
    """
    leaves = graph.output_node().args[0]
    assert isinstance(leaves, list | tuple)
    result = leaves[hidden]
    assert isinstance(result, fx.Node)
    inputs = [node for node in _above(result) if node.op == "placeholder"]
    early = _early(graph, set(inputs))
    carried = [n for n in graph.nodes if n in early and _is_tensor(n) and any(u not in early for u in n.users)]
    batches = {str(node.meta["val"].shape[0]) for node in inputs}
    names = [node.name for node in carried]
    return EncoderDecoderGraphs(
        _encoder(graph, names, {node.name for node in inputs}),
        _decoder(graph, names, {node.name for node in early}),
        tuple(node.name for node in graph.nodes if node in inputs),
        tuple(str(next(iter(node.meta["val"].shape), 1)) in batches for node in carried),
        names.index(result.name),
    )


def _values(node: fx.Node) -> list[fx.Node]:
    """Return the operands that are no sizes: sizes are read again wherever they are needed."""
    return [operand for operand in node.all_input_nodes if not isinstance(operand.meta["val"], torch.SymInt)]


def _above(node: fx.Node) -> Iterator[fx.Node]:
    todo, seen = [node], {node}
    while todo:
        one = todo.pop()
        yield one
        new = [operand for operand in _values(one) if operand not in seen]
        seen.update(new)
        todo += new


def _early(graph: fx.Graph, inputs: set[fx.Node]) -> set[fx.Node]:
    """Return the inputs and the nodes that depend on them alone, and on no other input's sizes."""
    known = {str(size) for node in inputs for size in node.meta["val"].shape}
    early, late = set(inputs), set[fx.Node]()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "output"):
            late |= {node} - inputs
        elif isinstance(value, torch.SymInt):
            late |= set() if {str(one) for one in value.node.expr.free_symbols} <= known else {node}
        elif not late.isdisjoint(node.all_input_nodes):
            late.add(node)
        elif not early.isdisjoint(node.all_input_nodes):
            early.add(node)
    return early


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _encoder(graph: fx.Graph, carried: list[str], inputs: set[str]) -> fx.Graph:
    new = copy_graph(graph)
    nodes = {node.name: node for node in new.nodes}
    new.output_node().args = ([nodes[name] for name in carried],)
    return _only(new, [nodes[name] for name in nodes if name in inputs])


def _decoder(graph: fx.Graph, carried: list[str], early: set[str]) -> fx.Graph:
    new = copy_graph(graph)
    first = next(node for node in new.nodes if node.op != "placeholder")
    nodes = {node.name: node for node in new.nodes}
    inputs = [node for node in new.nodes if node.op == "placeholder" and node.name not in early]
    for name in carried:
        with new.inserting_before(first):
            node = new.placeholder(f"carried_{name}")
        node.meta = {"val": nodes[name].meta["val"]}
        nodes[name].replace_all_uses_with(node, delete_user_cb=lambda user: user.name not in early)
        inputs.append(node)
    return _only(new, inputs)


def _only(graph: fx.Graph, inputs: list[fx.Node]) -> fx.Graph:
    """Restrict `graph`, in place, to these inputs; sizes are read from them."""
    for node in graph.nodes:
        if node.target is aten.sym_size.int and node.args[0] not in inputs:
            read_size_from(node, inputs)
    remove_dead_nodes(graph)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node not in inputs:
            graph.erase_node(node)
    return graph


class EncoderDecoderRunner:
    """A graph that runs in halves: one call of the encoder, then a call of the decoder for every token."""

    def __init__(self, graph: fx.Graph, signature: Signature, title: str) -> None:
        self.halves = split_encoder_decoder(graph, signature.output_keys.index(HIDDEN))
        self._signature = signature
        self._title = title
        self._encoder = compile_graph(self.halves.encoder, title)
        self._decoders: dict[frozenset[str], tuple[Code, tuple[bool, ...]]] = {}

    def encode(self, module: nn.Module, tensors: Sequence[Tensor | None]) -> Any:
        """Return the encoder's output, with the values that the decoder reads from the encoder.

        Raises:
            CallError: an input of the encoder is missing.
        """
        from transformers.modeling_outputs import BaseModelOutput

        given = self._by_name(tensors)
        missing = [name for name in self.halves.inputs if given[name] is None]
        if missing:
            raise CallError(f"Missing input {', '.join(missing)}: the encoder was traced with it.")
        values = self._encoder(module, *(given[name] for name in self.halves.inputs))
        output: Any = BaseModelOutput(last_hidden_state=values[self.halves.hidden])
        output.carried = values
        return output

    def decode(self, module: nn.Module, encoded: Any, tensors: Sequence[Tensor | None]) -> Any:
        """Return the model's output for tensors in placeholder order; those of the encoder are not read.

        Raises:
            CallError: `encoded` does not come from `encode`.
        """
        if not hasattr(encoded, "carried"):
            raise CallError("encoder_outputs must come from this module's get_encoder().")
        rest = {name: value for name, value in self._by_name(tensors).items() if name not in self.halves.inputs}
        missing = frozenset(name for name, value in rest.items() if value is None)
        if missing not in self._decoders:
            graph, kept = without_missing_inputs(self.halves.decoder, self._signature, missing)
            self._decoders[missing] = compile_graph(graph, self._title), kept
        code, kept = self._decoders[missing]
        given = [value for value in rest.values() if value is not None]
        leaves = code(module, *given, *self.halves.carried(encoded.carried, given[0].shape[0]))
        return build_outputs(self._signature.outputs, leaves, kept)

    def _by_name(self, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        return {spec.name: value for spec, value in zip(self._signature.inputs, tensors, strict=True)}


class EncoderModule(nn.Module):
    """The encoder's half of a module, for whoever calls it apart; its parameters are that module's."""

    def __init__(self, encode: Callable[..., Any], signature: Signature, inputs: Sequence[str]) -> None:
        super().__init__()
        names = {spec.argument for spec in signature.inputs if spec.name in inputs}

        def forward(*args: Any, **kwargs: Any) -> Any:
            return encode(args, kwargs)

        forward.__signature__ = inspect.Signature([p for n, p in signature.forward.parameters.items() if n in names])
        self.forward = forward
