"""Joins: residual adds s + f, where f descends from s through something heavy; and the streams they form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from . import ops
from .flow import Flow
from .norms import Norm

PARALLEL = 3  # how many joins on one skip are still parallel branches


@dataclass(frozen=True, eq=False)
class Join:
    """`node` = `skip` + `branch`. `source`: the value both sides come from. `previous`: the join before it
    on the
    stream, None for the first. `root`: where the stream starts. `passed`: norms on the skip chain."""

    node: fx.Node
    skip: fx.Node
    branch: fx.Node
    source: fx.Node
    previous: Join | None
    root: fx.Node
    passed: tuple[Norm, ...]


def find_joins(flow: Flow, heavy: int, norm_at: Mapping[fx.Node, Norm]) -> list[Join]:
    joins: dict[fx.Node, Join] = {}
    for node in flow.nodes:
        if ops.name(node) not in ("add", "__add__", "iadd"):
            continue
        sides = [one for one in flow.operands(node) if flow.floating(one)]  # learned latents may start a stream
        if len(sides) != 2 or flow.shape(sides[0]) != flow.shape(sides[1]):
            continue
        for skip, branch in (sides, sides[::-1]):
            source = _source(flow, skip, branch, heavy, joins)
            if source is not None:
                previous, root, passed = behind(flow, skip, joins, norm_at)
                joins[node] = Join(node, skip, branch, source, previous, root, passed)
                break
    return list(joins.values())


def _source(flow: Flow, skip: fx.Node, branch: fx.Node, heavy: int, joins: dict[fx.Node, Join]) -> fx.Node | None:
    """The value on the skip side that the branch starts from."""
    here: fx.Node | None = skip
    crossed = 0
    while here is not None:
        if flow.descends(branch, here):
            return here if _heavy_between(flow, here, branch, heavy) and _local(flow, here, branch, joins) else None
        if here in joins:
            crossed += 1
            here = joins[here].skip if crossed < PARALLEL else None
        else:
            here = flow.source(here)
    return None


def _heavy_between(flow: Flow, source: fx.Node, branch: fx.Node, heavy: int) -> bool:
    mask = (flow.before(branch) | flow.bit(branch)) & ~flow.before(source) & ~flow.bit(source) & heavy
    return any(flow.descends(node, source) for node in flow.members(mask))


def _local(flow: Flow, source: fx.Node, branch: fx.Node, joins: dict[fx.Node, Join]) -> bool:
    """No join of the same stream lies between the source and the branch."""
    for node in reversed(joins):
        if flow.descends(source, node):
            return True
        if flow.descends(node, source) and flow.descends(branch, node):
            return False
    return True


def behind(
    flow: Flow, node: fx.Node, joins: dict[fx.Node, Join], norm_at: Mapping[fx.Node, Norm]
) -> tuple[Join | None, fx.Node, tuple[Norm, ...]]:
    """Walk back along a stream: the join reached (if any), the stream's root, and the norms passed on the
    way."""
    passed: list[Norm] = []
    while True:
        if node in joins:
            return joins[node], joins[node].root, tuple(passed)
        if node in norm_at:
            passed.append(norm_at[node])
            node = norm_at[node].input
            continue
        source = flow.source(node)
        if source is None:
            return None, node, tuple(passed)
        node = source
