"""The calling convention of a traced graph: its inputs with names for their sizes, and the keys of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from peftgraph.capture.example_inputs import Example
from peftgraph.capture.export_run import ExportResult
from peftgraph.capture.size_decisions import SizeDecisions, size_condition
from peftgraph.ir.arguments import leaves_with_keys
from peftgraph.ir.assumption import Assumption
from peftgraph.ir.shape_inference import concrete_size
from peftgraph.ir.signature import FIXED_BY_CALLER, InputSpec, Signature, SizeCondition

Symbols = dict[str, tuple[sympy.Basic | None, ...]]  # what each size of an input was as the export began, by its name


def input_symbols(graph: fx.Graph) -> Symbols:
    """Return the symbols of the inputs of a graph whose recorded values are still the exporter's."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return {
        node.name: tuple(one.node._expr if isinstance(one, torch.SymInt) else None for one in node.meta["val"].shape)
        for node in inputs
    }


def derive_signature(
    graph: fx.Graph, exported: ExportResult, bound: Example, symbols: Symbols, assumptions: tuple[Assumption, ...]
) -> Signature:
    """Return the signature of a canonical graph; the keys and fills of its placeholders are recorded on them, in
    place."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = [leaf for leaf in bound.leaves if isinstance(leaf.value, Tensor)]
    parameters = bound.forward.parameters
    sizes = _Sizes.of(placeholders, symbols)
    inputs = []
    for node, leaf in zip(placeholders, leaves, strict=True):
        dims = tuple(map(sizes.name, node.meta["val"].shape))
        parameter = parameters.get(leaf.argument)
        optional = parameter is None or parameter.default is not parameter.empty
        fill = bound.defaults.get(leaf.argument)
        fixed = sizes.fixed(node, exported.decisions) | dict.fromkeys(bound.fixed.get(leaf.key, ()), FIXED_BY_CALLER)
        inputs.append(InputSpec(node.name, leaf.key, leaf.argument, leaf.value.dtype, dims, optional, fill, fixed))
        node.meta |= {"label": leaf.key, "default": fill}
    ranges = {}
    for symbol, span in exported.program.range_constraints.items():
        if str(symbol) in sizes.names:
            high = int(span.upper) if span.upper.is_Integer and int(span.upper) < 2**31 else None
            # A lower bound of 2 is how the exporter says "not specialised to 1"; the graph runs at 1 too.
            ranges[sizes.names[str(symbol)]] = (1 if int(span.lower) <= 2 else int(span.lower), high)
    constants = {leaf.key: leaf.value for leaf in bound.leaves if not isinstance(leaf.value, Tensor)}
    spec = exported.outputs
    keys, asked = _output_keys(spec), (sizes.conditions(exported.decisions), assumptions)
    return Signature(bound.forward, tuple(inputs), constants, ranges, spec, keys, bound.assumed, bound.kv_cache, *asked)


@dataclass(frozen=True)
class _Sizes:
    """The sizes of the inputs.

    Attributes:
        names: by the expression of a size, as text, its readable name: B, B2, ... for first dimensions, else S, T, U.
        given: see `Symbols`.
        now: by such a symbol, the expression that is in its place since then.
    """

    names: dict[str, str]
    given: Symbols
    now: dict[sympy.Basic, sympy.Basic]

    @classmethod
    def of(cls, placeholders: Sequence[fx.Node], given: Symbols) -> _Sizes:
        names: dict[str, str] = {}
        batches = iter(["B", *(f"B{i}" for i in range(2, 1000))])
        lengths = iter(["S", "T", "U", "V", "W", *(f"N{i}" for i in range(1000))])
        now: dict[sympy.Basic, sympy.Basic] = {}
        for node in placeholders:
            for axis, (size, symbol) in enumerate(zip(node.meta["val"].shape, given[node.name], strict=True)):
                if symbol is not None:
                    now[symbol] = sympy.Integer(size) if isinstance(size, int) else size.node.expr
                if concrete_size(size) is None and str(size) not in names:
                    names[str(size)] = next(lengths if axis else batches)
        return cls(names, given, now)

    def name(self, size: int | torch.SymInt) -> int | str:
        """Return the name of a size; a number where the model's code fixed it, however the exporter represents it."""
        number = concrete_size(size)
        return self.names[str(size)] if number is None else number

    def fixed(self, node: fx.Node, decisions: SizeDecisions) -> dict[int, str]:
        """Return the lines that fixed the sizes of an input, by dimension."""
        lines = {axis: decisions.fixed.get(symbol, "") for axis, symbol in enumerate(self.given[node.name]) if symbol}
        return {axis: line for axis, line in lines.items() if line}

    def conditions(self, decisions: SizeDecisions) -> tuple[SizeCondition, ...]:
        """Return the conditions that branches put on the sizes, and those that define sizes computed from others."""
        known: dict[sympy.Basic, sympy.Basic] = {}
        made: list[tuple[sympy.Symbol, sympy.Basic]] = []
        for symbol, expression in self.now.items():
            if isinstance(expression, sympy.Integer):
                known[symbol] = expression
                continue
            named = known[symbol] = sympy.Symbol(self.names[str(expression)], integer=True, positive=True)
            if isinstance(expression, sympy.Symbol):
                known[expression] = named
            else:
                made.append((named, expression))
        found = list(decisions.conditions(known))
        for name, expression in made:
            if expression.free_symbols <= set(known):
                found.append(size_condition(sympy.Eq(name, expression.xreplace(known)), ""))
        return tuple(found)


def _output_keys(spec: pytree.TreeSpec) -> tuple[str, ...]:
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    keys = [key for key, _ in leaves_with_keys("", leaves)]
    return tuple(key.replace("['", ".").replace("']", "").removeprefix(".") or "output" for key in keys)
