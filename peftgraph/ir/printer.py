"""Prints a program as deterministic text, and the difference between two programs.

Every value has a printed name (`meta["label"]`) derived from the sites around it or from the edit that made it,
never from FX's counters; it stays the same when a pass rewrites the graph elsewhere. `assign_labels` names the
values of the base.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from peftgraph.ir.dead_code import live_nodes
from peftgraph.ir.dtypes import short_dtype
from peftgraph.ir.program import ProgramData
from peftgraph.ir.quantised import COMPUTES_IN

LAST = sys.maxsize


def assign_labels(graph: fx.Graph, titles: Mapping[str, str], sections: Mapping[str, str]) -> None:
    """Name every value of a base graph, in place.

    Args:
        graph: a canonical graph.
        titles: node name -> printed name, for the values that sites know (`0.attention.q`).
        sections: node name -> prefix for the values around it, such as a block's id; nodes after it belong to it too.
    """
    counts: Counter[str] = Counter(titles.values())
    section = ""
    for node in graph.nodes:
        section = sections.get(node.name, section)
        if node.op != "call_function":
            continue
        title = titles.get(node.name)
        if title is None:
            stem = f"{section}.{_operator(node)}".lstrip(".")
            counts[stem] += 1
            title = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        node.meta["label"] = title


def print_program(program: ProgramData) -> str:
    """Return the text of a program: its calling convention, then one line for each value, in graph order."""
    printer = Printer.of(program)
    signature = program.signature
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, list | tuple)
    results = [
        f"{key}: {printer.type_of(leaf)}"
        for key, leaf in zip(signature.output_keys, outputs, strict=True)
        if leaf is not None
    ]
    lines = [f"{program.model}({signature.describe()}) -> {{{', '.join(results)}}}"]
    lines += [f"  assumes {one}" for one in signature.assumptions]
    lines += [f"  {printer.line(node)}" for node in live_nodes(program.graph) if node.op == "call_function"]
    lines.append(f"  return {printer.operand(outputs)}")
    return "\n".join(lines) + "\n"


def print_diff(before: ProgramData, after: ProgramData) -> str:
    """Return the difference between two programs: the new values around each edited one, in text order, and totals."""
    old, new = Printer.of(before), Printer.of(after)
    more = {size: count - before.prepended_lengths().get(size, 0) for size, count in after.prepended_lengths().items()}
    as_before = Printer(new.sizes, new.trainable, more)
    was = {node.name: old.line(node) for node in live_nodes(before.graph) if node.op in ("call_function", "output")}
    lines = _input_lines(before, after)
    added = moved = longer = 0
    context: str | None = None
    present = live_nodes(after.graph)
    for node in present:
        if node.op not in ("call_function", "output"):
            continue
        line = new.line(node)
        if node.name not in was:
            if context is not None:
                lines.append(f"    {context}")
                context = None
            lines.append(f"  + {line}")
            added += 1
            continue
        context = line if node.op == "call_function" else None
        if more and was[node.name] == as_before.line(node):
            longer += was[node.name] != line
        elif was[node.name] != line:
            moved += 1
            lines += [f"  - {was[node.name]}", f"  + {line}"]
            context = None
    names = {node.name for node in present}
    erased = [line for name, line in was.items() if name not in names]
    lines += [f"  - {line}" for line in erased]
    if longer:
        by = ", ".join(f"{size} + {count}" for size, count in more.items())
        lines.append(f"  {_many(longer, 'line')} for {by}")
    return "\n".join([*_with_headings(lines, after), _totals(before, after, added, len(erased), moved)]) + "\n"


def _input_lines(before: ProgramData, after: ProgramData) -> list[str]:
    """Return a line for each input that passes added to a model or took away."""
    was, now = ([one for one in program.signature.inputs if one.added] for program in (before, after))
    return [
        *(f"  - input {one.describe()}" for one in was if one not in now),
        *(f"  + input {one.describe()}" for one in now if one not in was),
    ]


def _with_headings(lines: Iterable[str], program: ProgramData) -> list[str]:
    passes = [f"{applied.method}" + (f" as {applied.name!r}" if applied.name else "") for applied in program.history]
    return [*passes, *lines]


def _totals(before: ProgramData, after: ProgramData, added: int, erased: int, moved: int) -> str:
    fresh = {name: p for name, p in after.table.trainable.items() if name not in before.table.trainable}
    sites = {edit.site for edit in after.edits} - {edit.site for edit in before.edits}
    values = sum(parameter.numel() for parameter in fresh.values())
    return (
        f"{_many(len(sites), 'site')}, +{_many(added, 'node')}, -{_many(erased, 'node')}, "
        f"{_many(moved, 'line')} changed, +{_many(len(fresh), 'parameter')} ({_many(values, 'trainable value')})"
    )


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Printer:
    """Prints single lines of a program.

    Args:
        sizes: symbol of a symbolic size -> its printed name.
        trainable: names of stored tensors that get a star.
        less: printed name of a size -> what is taken off wherever it is printed.
    """

    def __init__(
        self, sizes: Mapping[str, str], trainable: Container[str] = (), less: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.sizes = sizes
        self.trainable = trainable
        self.less = less
        self._printed: dict[object, str] = {}  # sizes, which repeat on every line

    @classmethod
    def of(cls, program: ProgramData) -> Printer:
        return cls(size_names(program), program.table.trainable)

    def line(self, node: fx.Node) -> str:
        """Return the line of a labelled node."""
        if node.op == "output":
            return f"return {self.operand(node.args[0])}"
        arguments = [self.operand(value) for value in node.args]
        arguments += [f"{name}={self.operand(value)}" for name, value in node.kwargs.items() if name != "pin_memory"]
        narrowed = node.meta.get(COMPUTES_IN)
        inside = "" if narrowed is None else f" in {short_dtype(narrowed)}"
        return f"%{node.meta['label']}: {self.type_of(node)} = {_operator(node)}({', '.join(arguments)}){inside}"

    def operand(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return f"@{value.target}{'*' if str(value.target) in self.trainable else ''}"
            return f"%{value.meta['label']}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.operand(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return short_dtype(value)
        if isinstance(value, torch.device):
            return value.type
        if isinstance(value, int) and not isinstance(value, bool) and value == LAST:
            return "end"
        return repr(value)

    def type_of(self, value: Any) -> str:
        recorded = value.meta.get("val") if isinstance(value, fx.Node) else value
        if isinstance(recorded, Tensor):
            dims = ", ".join(self.size(size) for size in recorded.shape)
            return f"{short_dtype(recorded.dtype)}[{dims}]"
        if isinstance(recorded, list | tuple):
            return f"({', '.join(self.type_of(item) for item in recorded)})"
        if isinstance(recorded, torch.SymInt):
            return self.size(recorded)
        return type(recorded).__name__

    def size(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        if expression not in self._printed:
            known = {one: self.sizes[str(one)] for one in expression.free_symbols if str(one) in self.sizes}
            named = {symbol: sympy.Symbol(name) - self.less.get(name, 0) for symbol, name in known.items()}
            self._printed[expression] = str(expression.subs(named))
        return self._printed[expression]


def size_names(program: ProgramData) -> dict[str, str]:
    """Return the printed name of each symbolic size of the inputs, by its symbol."""
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    table: dict[str, str] = {}
    for node, spec in zip(placeholders, program.signature.inputs, strict=True):
        for size, name in zip(node.meta["val"].shape, spec.dims, strict=True):
            if isinstance(name, str):
                table[str(size)] = name
    return table


def _operator(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target)).strip("_")
