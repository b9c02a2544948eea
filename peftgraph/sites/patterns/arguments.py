"""The arguments of a call in a graph, as patterns see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from peftgraph.sites.dataflow import ops


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call by position, lists of values opened, and by name with the operator's defaults."""

    values: tuple[object, ...]
    named: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, node: fx.Node) -> Arguments:
        schema = getattr(node.target, "_schema", None)
        known = [] if schema is None else list(schema.arguments)
        given: list[object] = list(node.args)
        for argument in known[len(given) :]:
            given.append(node.kwargs.get(argument.name, argument.default_value))
        named = tuple((one.name, value) for one, value in zip(known, given, strict=False))
        positional = len(given) - sum(one.kwarg_only for one in known)
        return cls(tuple(_opened(given[:positional])), named)

    def has(self, name: str, wanted: object) -> bool:
        return any(key == name and same_constant(value, wanted) for key, value in self.named)

    def shown(self, name: str) -> str:
        return next((repr(value) for key, value in self.named if key == name), "nothing, it has no such argument")


def _opened(values: Sequence[object]) -> Iterator[object]:
    """Yield the values; where one is a list of values, as of cat, the list's own."""
    for value in values:
        if isinstance(value, list | tuple) and any(isinstance(one, fx.Node) for one in value):
            yield from value
        else:
            yield value


def same_constant(value: object, wanted: object) -> bool:
    """Equal literals: 2 equals 2.0, and true equals no number."""
    if isinstance(value, list | tuple) and isinstance(wanted, tuple):
        return len(value) == len(wanted) and all(map(same_constant, value, wanted))
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        return value == wanted
    return type(value) is type(wanted) and value == wanted


def excerpt(node: fx.Node) -> str:
    """Format one line of the graph: the name of a node and what it computes."""
    label = node.meta.get("label", node.name)
    if node.op != "call_function":
        return f"@{node.target}" if node.op == "get_attr" else f"%{label}"
    operands = [
        f"@{one.target}" if one.op == "get_attr" else f"%{one.meta.get('label', one.name)}"
        for one in node.all_input_nodes
    ]
    return f"%{label} = {ops.name(node)}({', '.join(operands)})"
