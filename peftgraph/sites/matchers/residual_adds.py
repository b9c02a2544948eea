"""Joins: residual adds s + f, where f descends from s through something heavy; and the streams they form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.products import factors, spelled
from peftgraph.sites.matchers.norms import Norm
from peftgraph.sites.site import NearMiss

ADDS: Final = ("add", "__add__", "iadd")
CONDITIONS: Final = (
    "an add of two signals",
    "two signals of one shape",
    "a branch that starts from the other side",
    "a projection, attention, convolution or pooling on the branch",
    "no other residual add of the stream within the branch",
)
PARALLEL = 3  # how many joins on one skip are still parallel branches


@dataclass(frozen=True, eq=False)
class Join:
    """`node` = `skip` + `branch`. `source`: the value both sides come from. `previous`: the join before it on the
    stream, None for the first. `root`: where the stream starts. `passed`: norms on the skip chain."""

    node: fx.Node
    skip: fx.Node
    branch: fx.Node
    source: fx.Node
    previous: Join | None
    root: fx.Node
    passed: tuple[Norm, ...]


def find_joins(flow: Flow, heavy: int, norm_at: Mapping[fx.Node, Norm], attended: Set[fx.Node]) -> list[Join]:
    """Return the joins of a graph in order; `attended`: the results of its attention cores, which no skip passes."""
    joins: dict[fx.Node, Join] = {}
    for node in flow.nodes:
        if ops.name(node) not in ADDS:
            continue
        sides = [one for one in flow.operands(node) if flow.floating(one)]  # learned latents may start a stream
        if len(sides) != 2 or not _alike(flow, *sides):
            continue
        for skip, branch in (sides, sides[::-1]):
            source = _source(flow, skip, branch, heavy, joins, attended)
            if source is not None:
                previous, root, passed = behind(flow, skip, joins, norm_at, attended)
                joins[node] = Join(node, skip, branch, source, previous, root, passed)
                break
    return list(joins.values())


def _source(
    flow: Flow, skip: fx.Node, branch: fx.Node, heavy: int, joins: dict[fx.Node, Join], attended: Set[fx.Node]
) -> fx.Node | None:
    """Return the value on the skip side that the branch starts from."""
    here = next((one for one in _stream(flow, skip, joins, attended) if flow.descends(branch, one)), None)
    if here is None or not _heavy_between(flow, here, branch, heavy) or not _local(flow, here, branch, joins):
        return None
    return here


def _stream(flow: Flow, skip: fx.Node, joins: Mapping[fx.Node, Join], attended: Set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the values on a skip, backward, over at most PARALLEL joins."""
    here: fx.Node | None = skip
    crossed = 0
    while here is not None:
        yield here
        if here in joins:
            crossed += 1
            here = joins[here].skip if crossed < PARALLEL else None
        else:
            here = _passed_on(flow, here, attended)


def _passed_on(flow: Flow, node: fx.Node, attended: Set[fx.Node]) -> fx.Node | None:
    """Return the value that a node of a skip passes on. Parallel streams may be mixed on the way by a square matrix,
    which is stored or which each position has of its own (hyper-connections, arXiv 2409.19606, 2512.24880)."""
    named, sides = (None, None) if node in attended else (spelled(node), factors(node))
    if named is None or sides is None:
        return flow.source(node)
    shape = flow.shape(node)
    for side, streams in enumerate(sides):
        mine, other = named.of(side), named.of(1 - side)
        changed = [i for i, pair in enumerate(zip(mine, named.result, strict=False)) if len(set(pair)) > 1]
        if flow.shape(streams) != shape or len(changed) != 1 or changed[0] == len(shape) - 1:
            continue
        place = changed[0]  # the axis of the streams; the last one is that of the features
        if mine[place] in other and named.result[place] in named.own(1 - side) and flow.signal(streams):
            return streams
    return None


def near_join(
    flow: Flow, node: fx.Node, heavy: int, joins: Mapping[fx.Node, Join], attended: Set[fx.Node]
) -> NearMiss | None:
    """Why an add is no join; None where it is one, or adds no two signals."""
    sides = [one for one in flow.operands(node) if flow.signal(one)]
    if ops.name(node) not in ADDS or len(sides) != 2 or node in joins:
        return None
    names = f"%{sides[0].name} and %{sides[1].name}"
    if not _alike(flow, *sides):
        return NearMiss.at("block", node, CONDITIONS, 1, f"{names} of different shapes", *sides)
    starts = [
        (here, branch)
        for skip, branch in (sides, sides[::-1])
        for here in _stream(flow, skip, joins, attended)
        if flow.descends(branch, here)
    ]
    if not starts:
        return NearMiss.at("block", node, CONDITIONS, 2, f"{names}, of which neither leads to the other", *sides)
    here, branch = starts[0]
    if not _heavy_between(flow, here, branch, heavy):
        return NearMiss.at(
            "block", node, CONDITIONS, 3, f"no projection, attention or convolution from %{here.name} on", *sides, here
        )
    return NearMiss.at(
        "block", node, CONDITIONS, 4, f"another residual add between %{here.name} and %{branch.name}", *sides, here
    )


def _heavy_between(flow: Flow, source: fx.Node, branch: fx.Node, heavy: int) -> bool:
    mask = (flow.before(branch) | flow.bit(branch)) & ~flow.before(source) & ~flow.bit(source) & heavy
    return any(flow.descends(node, source) for node in flow.members(mask))


def _local(flow: Flow, source: fx.Node, branch: fx.Node, joins: dict[fx.Node, Join]) -> bool:
    """Tell whether no join is between the source and the branch, except of streams that start inside the branch (a
    state-space model's scan adds its own scaled input)."""
    for node in reversed(joins):
        if flow.descends(source, node):
            return True
        root = joins[node].root
        inside = root is not source and flow.descends(root, source)
        if flow.descends(node, source) and flow.descends(branch, node) and not inside:
            return False
    return True


def behind(
    flow: Flow,
    node: fx.Node,
    joins: dict[fx.Node, Join],
    norm_at: Mapping[fx.Node, Norm],
    attended: Set[fx.Node],
) -> tuple[Join | None, fx.Node, tuple[Norm, ...]]:
    """Walk back along a stream: the join reached (if any), the stream's root, and the norms passed on the way."""
    passed: list[Norm] = []
    while True:
        if node in joins:
            return joins[node], joins[node].root, tuple(passed)
        if node in norm_at:
            passed.append(norm_at[node])
            node = norm_at[node].input
            continue
        source = _passed_on(flow, node, attended)
        if source is None:
            return None, node, tuple(passed)
        node = source


def _alike(flow: Flow, a: fx.Node, b: fx.Node) -> bool:
    """Tell whether two values have one shape, up to a leading batch of one, as rows of packed images may."""
    shapes = [flow.shape(a), flow.shape(b)]
    least = min(map(len, shapes))
    return len({shape[len(shape) - least :] for shape in shapes}) == 1 and all(
        size == 1 for shape in shapes for size in shape[: len(shape) - least]
    )
