"""The calling convention of a traced graph: its inputs with names for their sizes, and the keys of its outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from peftgraph.ir.signature import Input, Signature
from peftgraph.trace.example import Example


def signature_of(graph: fx.Graph, exported: ExportedProgram, bound: Example) -> Signature:
    """The signature of a canonical graph; its placeholders are told, in place, their keys and fills."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = [leaf for leaf in bound.leaves if isinstance(leaf.value, Tensor)]
    parameters = bound.forward.parameters
    symbols = _symbol_names(placeholders)
    inputs = []
    for node, leaf in zip(placeholders, leaves, strict=True):
        dims = tuple(size if isinstance(size, int) else symbols[str(size)] for size in node.meta["val"].shape)
        parameter = parameters.get(leaf.argument)
        optional = parameter is None or parameter.default is not parameter.empty
        fill = bound.fills.get(leaf.argument)
        inputs.append(Input(node.name, leaf.key, leaf.argument, leaf.value.dtype, dims, optional, fill))
        node.meta |= {"label": leaf.key, "fill": fill}
    ranges = {}
    for symbol, span in exported.range_constraints.items():
        if str(symbol) in symbols:
            high = int(span.upper) if span.upper.is_Integer and int(span.upper) < 2**31 else None
            # A lower bound of 2 is how the exporter says "not specialised to 1"; the graph runs at 1 too.
            ranges[symbols[str(symbol)]] = (1 if int(span.lower) <= 2 else int(span.lower), high)
    constants = {leaf.key: leaf.value for leaf in bound.leaves if not isinstance(leaf.value, Tensor)}
    spec = exported.call_spec.out_spec
    assert spec is not None
    keys = _output_keys(spec)
    return Signature(bound.forward, tuple(inputs), constants, ranges, spec, keys, bound.assumed, bound.past)


def _symbol_names(placeholders: Sequence[fx.Node]) -> dict[str, str]:
    """Readable names for the symbols of the input shapes: B, B2, ... for first dimensions, else S, T, U"""
    names: dict[str, str] = {}
    batches = iter(["B", *(f"B{i}" for i in range(2, 1000))])
    lengths = iter(["S", "T", "U", "V", "W", *(f"N{i}" for i in range(1000))])
    for node in placeholders:
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int) and str(size) not in names:
                names[str(size)] = next(lengths if axis else batches)
    return names


def _output_keys(spec: pytree.TreeSpec) -> tuple[str, ...]:
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = pytree.tree_flatten_with_path(leaves)[0]
    keys = [pytree.keystr(path) for path, _ in paths]
    return tuple(key.replace("['", ".").replace("']", "").removeprefix(".") or "output" for key in keys)
