"""Softmaxes: the operator, and the ones that a model writes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.patterns.match import Matcher
from peftgraph.sites.patterns.pattern import Pattern

WRITTEN: Final = Pattern(
    "softmax",
    """
    p     = div(~e, ~below) | exp(sub(z, ~level))
    e     = exp(z)
    below = total | add(total, number) | clamp_min(total, number)
    total = sum(~e)
    level = logsumexp(z)
    """,
)


def find_softmaxes(flow: Flow) -> Mapping[fx.Node, tuple[fx.Node, int | None]]:
    """Return every softmax: its result -> its operand, and its axis if it is a single one."""
    found = {
        node: (flow.operands(node)[0], _axis(node))
        for node in flow.nodes
        if ops.is_softmax(node) and flow.floating(node)
    }
    for match in Matcher(WRITTEN, flow, {}, {}).matches():
        reduction = match.nodes.get("total") or match.nodes["level"]
        found[match.nodes["p"]] = (match.nodes["z"], _axis(reduction))
    return found


def _axis(node: fx.Node) -> int | None:
    numbers = [one for one in node.args if isinstance(one, int) and not isinstance(one, bool)]
    axis = numbers[0] if "operators" in node.meta and numbers else ops.argument(node, 1, "dim")
    if isinstance(axis, list | tuple) and len(axis) == 1:
        axis = axis[0]
    return axis if isinstance(axis, int) else None
