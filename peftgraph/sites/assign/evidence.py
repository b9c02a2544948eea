"""Steps of an explanation: a claim, in which %name is a node by its graph name, and the nodes that show it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.matchers.residual_adds import Join

MOST_SHOWN: Final = 12  # a way of more nodes than this is not part of the excerpt


@dataclass(frozen=True)
class Step:
    """One claim, and the nodes that show it, by graph name."""

    claim: str
    nodes: tuple[str, ...] = ()


def step(claim: str, *nodes: fx.Node | Iterable[fx.Node]) -> Step:
    flat = [one for item in nodes for one in ([item] if isinstance(item, fx.Node) else item)]
    return Step(claim, tuple(dict.fromkeys(one.name for one in flat)))


def through(nodes: Iterable[fx.Node]) -> str:
    """Return the operators on a way, each once: "through view, transpose "."""
    names = [name for name in dict.fromkeys(ops.name(node) for node in nodes) if name != "getitem"]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"through {shown} " if names else ""


def stored(one: Projection) -> str:
    weight = one.weight
    window = "" if weight.window is None else f"[{weight.window}]"
    return f"@{weight.parameter}{window}" + (" (stored in x out)" if weight.transposed else "")


def joined(anatomy: Anatomy, join: Join, node: fx.Node) -> Step:
    """Return how a value enters the residual stream."""
    flow = anatomy.flow
    first = anatomy.projection_at[node].output if node in anatomy.projection_at else node
    way = flow.between(first, join.node)
    start = "" if join.skip is join.source else f" (%{join.source.name} on the way of %{join.skip.name})"
    return step(
        f"%{join.node.name} adds %{join.branch.name} to %{join.skip.name}, the value it started from{start}: "
        "a residual add",
        way if len(way) <= MOST_SHOWN else (),
        join.node,
    )


def readers(node: fx.Node) -> str:
    """Name the operators that read a value."""
    users = [user for user in node.users if user.op != "output"]
    return ", ".join(f"%{user.name} ({ops.name(user)})" for user in users[:3]) or "the model's output"
