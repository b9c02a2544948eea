"""Low-rank side paths: y = W x + s B A x, as adapters that were put into a model before it was traced leave them.

They are neither feed-forwards nor projections of the model: A plays `side.down`, B `side.up`, and W keeps its role.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.matchers.projections import Projection


@dataclass(frozen=True, eq=False)
class SidePath:
    """`up(down(x))` is added to `host(x)`; its rank is the width of `down`."""

    down: Projection
    up: Projection
    host: Projection


def find_side_paths(
    flow: Flow, projections: Iterable[Projection], projection_at: Mapping[fx.Node, Projection]
) -> list[SidePath]:
    found: list[SidePath] = []
    for up in projections:
        down = _behind(flow, up.input, projection_at)
        if down is None or down is up or not _low_rank(flow, down, up):
            continue
        hosts = _hosts(flow, up, projection_at)
        host = next((one for one in hosts if _beside(flow, one, down, up)), None)
        if host is not None:
            found.append(SidePath(down, up, host))
    return found


def _behind(flow: Flow, node: fx.Node, projection_at: Mapping[fx.Node, Projection]) -> Projection | None:
    """Return the projection whose result a value is, up to layout, casts, dropout and scaling."""
    here: fx.Node | None = node
    while here is not None and here not in projection_at:
        here = flow.source(here)
    return None if here is None else projection_at[here]


def _low_rank(flow: Flow, down: Projection, up: Projection) -> bool:
    return down.width < min(up.width, flow.shape(down.input)[down.input_axis])


def _beside(flow: Flow, host: Projection, down: Projection, up: Projection) -> bool:
    same = flow.strip(host.input) is flow.strip(down.input)
    return same and host.width == up.width and host not in (down, up)


def _hosts(flow: Flow, up: Projection, projection_at: Mapping[fx.Node, Projection]) -> list[Projection]:
    """Return the projections that the path's result is added to, directly or after other side paths."""
    hosts: list[Projection] = []
    node = up.output
    while len(node.users) == 1:
        user = next(iter(node.users))
        if ops.name(user) == "add":
            hosts += [
                one
                for other in flow.operands(user)
                if other is not node
                for one in _summands(flow, other, projection_at)
            ]
        elif hosts or flow.source(user) is not node:
            break
        node = user
    return hosts


def _summands(flow: Flow, node: fx.Node, projection_at: Mapping[fx.Node, Projection]) -> list[Projection]:
    """Return the projections among the summands of a value."""
    found = _behind(flow, node, projection_at)
    if found is not None:
        return [found]
    value = flow.strip(node)
    if ops.name(value) != "add":
        return []
    return [one for operand in flow.operands(value) for one in _summands(flow, operand, projection_at)]
