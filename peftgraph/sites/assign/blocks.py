"""Blocks: the sublayers on each stream, cut into layers by the period of their kinds, and the stacks they
form."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import or_

from torch import fx

from peftgraph.sites.assign.attention import Attention
from peftgraph.sites.assign.feedforward import FeedForward
from peftgraph.sites.assign.periods import cut
from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.attention_cores import Core
from peftgraph.sites.matchers.residual_adds import Join
from peftgraph.sites.site import Layout

MODULATION = ops.words("add mul addcmul")  # x * (1 + scale) + shift, as adaptive norms write it


@dataclass(frozen=True, eq=False)
class Sublayer:
    """An attention or a feed-forward between two points of the residual stream."""

    role: str
    join: Join
    kind: str | None
    input: fx.Node
    output: fx.Node
    memory: fx.Node | None
    members: tuple[fx.Node, ...]
    core: Core | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """A chain of joins. `kinds`: one letter for each sublayer on a join: M self attention, X cross attention,
    F feed-forward, C convolution, P pooling, L other. `blocks`: half-open ranges of joins."""

    joins: tuple[Join, ...]
    kinds: tuple[str, ...]
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Place:
    """A layer, the number of layers of its stack, and the stack."""

    layer: int
    depth: int
    stack: str | None


class Blocks:
    def __init__(self, anatomy: Anatomy, attentions: Sequence[Attention], feedforwards: Sequence[FeedForward]) -> None:
        self.anatomy = anatomy
        self.sublayers = _sublayers(anatomy, attentions, feedforwards)
        self.roles_from: dict[fx.Node, set[str]] = {}  # by the value they start from; two roles are parallel
        for one in (one for found in self.sublayers.values() for one in found):
            self.roles_from.setdefault(one.join.source, set()).add(one.role)
        self._orders = [anatomy.flow.order[join.node] for join in anatomy.joins]
        self.streams = _streams(anatomy, self.sublayers)
        layered = [stream for stream in self.streams if stream.blocks]
        names = _stacks(anatomy, layered, attentions, self.sublayers)
        self.places: dict[Join, Place] = _number(layered, names, self.sublayers)
        self.post = {join for stream in self.streams for join in _post(stream)}

    def around(self, node: fx.Node) -> Join | None:
        """Return the join inside whose branch a node lies."""
        flow = self.anatomy.flow
        for join in islice(self.anatomy.joins, bisect_right(self._orders, flow.order[node]), None):
            if flow.descends(join.branch, node):
                return join if node is not join.source and flow.descends(node, join.source) else None
        return None

    def layout(self, sublayer: Sublayer) -> Layout | None:
        pre = _norm_between(self.anatomy, sublayer.input, sublayer.join.source)
        if _normed(self.anatomy, sublayer.output):
            return "sandwich"
        return "pre" if pre else "post" if sublayer.join in self.post else None


def _number(
    streams: Sequence[Stream], stacks: Sequence[str | None], sublayers: dict[Join, list[Sublayer]]
) -> dict[Join, Place]:
    """Count the layers within each stack; a block that attends jointly with a numbered one gets its number."""
    numbers: dict[Join, tuple[int, str | None]] = {}
    counts: dict[str | None, int] = {}
    layer_of: dict[Core, int] = {}
    for stream, stack in zip(streams, stacks, strict=True):
        for start, stop in stream.blocks:
            joins = stream.joins[start:stop]
            cores = _cores(joins, sublayers)
            layer = next((layer_of[core] for core in cores if core in layer_of), counts.get(stack, 0))
            counts[stack] = max(counts.get(stack, 0), layer + 1)
            layer_of.update(dict.fromkeys(cores, layer))
            numbers.update(dict.fromkeys(joins, (layer, stack)))
    return {join: Place(layer, counts[stack], stack) for join, (layer, stack) in numbers.items()}


def _cores(joins: Sequence[Join], sublayers: dict[Join, list[Sublayer]]) -> list[Core]:
    return [one.core for join in joins for one in sublayers[join] if one.core is not None]


def _normed(anatomy: Anatomy, node: fx.Node) -> bool:
    """Tell whether a value is a norm's result, up to layout, dropout and scaling."""
    here: fx.Node | None = node
    while here is not None and here not in anatomy.norm_at and here not in anatomy.projection_at:
        here = anatomy.flow.source(here)
    return here in anatomy.norm_at


def _norm_between(anatomy: Anatomy, node: fx.Node, source: fx.Node) -> bool:
    """Tell whether a norm is between a sublayer's input and the stream, modulated by a condition or not."""
    flow = anatomy.flow
    while node is not source:
        if node in anatomy.norm_at:
            return True
        before = flow.source(node)
        if before is None and ops.name(node) in MODULATION:
            inside = [one for one in flow.operands(node) if flow.descends(one, source)]
            if len(inside) > 1:  # one of them may be a weight for each position, as a router gives
                inside = [one for one in inside if flow.shape(one)[-1:] == flow.shape(node)[-1:]]
            before = inside[0] if len(inside) == 1 else None
        elif before is None and flow.channelwise(node):
            before = flow.operands(node)[0]
        if before is None:
            return False
        node = before
    return False


def _post(stream: Stream) -> list[Join]:
    """Return the joins that a norm follows on the skip chain; a stream's last join follows the others' example."""
    followed = [join.previous for join in stream.joins if join.previous is not None and join.passed]
    return [*followed, stream.joins[-1]] if followed and len(followed) >= len(stream.joins) - 1 else followed


def _sublayers(
    anatomy: Anatomy, attentions: Sequence[Attention], feedforwards: Sequence[FeedForward]
) -> dict[Join, list[Sublayer]]:
    found: dict[Join, list[Sublayer]] = {join: [] for join in anatomy.joins}
    ends: dict[fx.Node, list[Attention]] = {}
    for one in attentions:
        for end in [part.projection.output for part in one.role("o")] or [one.core.output]:
            ends.setdefault(end, []).append(one)
    fed = {one.join: one for one in feedforwards}
    for join in anatomy.joins:
        frontier = anatomy.frontier(join.branch)
        reached = [one.output for one in frontier.projections] + list(frontier.stops)
        heads = [(end, one) for end in reached for one in ends.get(end, [])[:1]]
        downs = [down.output for down in fed[join].downs] if join in fed else []
        for end, one in heads:
            others = [other for other, _ in heads if other is not end] + downs
            found[join].append(_attention_sublayer(anatomy, join, one, end, others))
        if join in fed:
            found[join].append(_ffn_sublayer(anatomy, join, fed[join], [end for end, _ in heads]))
    return found


def _attention_sublayer(
    anatomy: Anatomy, join: Join, one: Attention, end: fx.Node, others: Sequence[fx.Node]
) -> Sublayer:
    inside = [part for part in one.role("q") if anatomy.flow.descends(part.projection.input, join.source)]
    q, k = inside or one.role("q"), one.role("k")
    value = q[0].projection.input if q else one.core.q
    memory = k[0].projection.input if k and one.kind == "cross" else None
    members = tuple(part.projection.node for part in one.parts) or (one.core.node,)
    output = _leaf(anatomy, join.branch, end, others)
    return Sublayer("attention", join, one.kind, _full(anatomy, join, value), output, memory, members, one.core)


def _ffn_sublayer(anatomy: Anatomy, join: Join, one: FeedForward, others: Sequence[fx.Node]) -> Sublayer:
    value = next((part.projection.input for part in one.parts if part.role != "ffn.down"), one.downs[0].input)
    members = tuple(part.projection.node for part in one.parts)
    output = _leaf(anatomy, join.branch, one.downs[0].output, others)
    return Sublayer("ffn", join, None, _full(anatomy, join, value), output, None, members)


def _full(anatomy: Anatomy, join: Join, value: fx.Node) -> fx.Node:
    """Return the value a projection reads, before it was flattened or dispatched to experts."""
    flow = anatomy.flow
    here: fx.Node | None = value
    while here is not None and here not in anatomy.norm_at and here is not join.source:
        if flow.shape(here) == flow.shape(join.node):
            return here
        here = flow.source(here)
    return value if here is None or flow.shape(here) != flow.shape(join.node) else here


def _leaf(anatomy: Anatomy, node: fx.Node, end: fx.Node, others: Sequence[fx.Node]) -> fx.Node:
    """Return the part of a branch that descends from `end` and from none of the parallel sublayers' ends."""
    flow = anatomy.flow
    while any(flow.descends(node, other) for other in others):
        inside = [one for one in flow.operands(node) if flow.descends(one, end)]
        if len(inside) != 1:
            break
        node = inside[0]
    return node


def _streams(anatomy: Anatomy, sublayers: dict[Join, list[Sublayer]]) -> list[Stream]:
    chains: dict[fx.Node, list[Join]] = {}
    for join in anatomy.joins:
        chains.setdefault(join.root, []).append(join)
    streams: list[Stream] = []
    for chain in chains.values():
        kinds = tuple(_letters(anatomy, join, sublayers[join]) for join in chain)
        streams.append(Stream(tuple(chain), kinds, tuple(cut(kinds))))
    if any(_mixes(stream) for stream in streams):
        return [stream if _mixes(stream) else Stream(stream.joins, stream.kinds, ()) for stream in streams]
    return [Stream(one.joins, one.kinds, ()) if _is_inner(anatomy, one, streams) else one for one in streams]


def _is_inner(anatomy: Anatomy, stream: Stream, streams: Sequence[Stream]) -> bool:
    """Tell whether sums without a known sublayer before them are parts of another stream's sublayers, such as a state
    space model that adds its scaled input to its result."""
    flow = anatomy.flow
    around = [join for other in streams if other is not stream and other.blocks for join in other.joins]

    def inside(join: Join) -> bool:
        return any(flow.descends(one.branch, join.node) and flow.descends(join.source, one.source) for one in around)

    return set("".join(stream.kinds)) <= {"L", "P"} and all(map(inside, stream.joins))


def _mixes(stream: Stream) -> bool:
    """Tell whether the stream carries attention. Where one does, the others (stems, pooling heads) have no blocks."""
    return any(set(kind) & {"M", "X"} for kind in stream.kinds)


def _letters(anatomy: Anatomy, join: Join, sublayers: Sequence[Sublayer]) -> str:
    letters = {"F" if one.role == "ffn" else "X" if one.kind == "cross" else "M" for one in sublayers}
    if letters:
        return "".join(sorted(letters))
    frontier = anatomy.frontier(join.branch)
    names = {ops.name(one) for one in (*frontier.stops, *frontier.between)}
    return "C" if names & ops.CONV else "P" if names & ops.POOLING else "L"


def _stacks(
    anatomy: Anatomy,
    streams: Sequence[Stream],
    attentions: Sequence[Attention],
    sublayers: dict[Join, list[Sublayer]],
) -> list[str | None]:
    """Return encoder and decoder by who reads whom; continued stages share a stack; else towers by number."""
    groups = _groups(anatomy, streams, sublayers)
    count = len(dict.fromkeys(groups))
    reads = _reads(anatomy, streams, groups, attentions)
    if reads:
        decoders = {reader for reader, _ in reads}
        encoders = {memory for _, memory in reads} - decoders
        return ["decoder" if g in decoders else "encoder" if g in encoders else f"tower{g}" for g in groups]
    return [None if count == 1 else f"tower{group}" for group in groups]


def _reads(
    anatomy: Anatomy, streams: Sequence[Stream], groups: Sequence[int], attentions: Sequence[Attention]
) -> set[tuple[int, int]]:
    """Return (group of q, group of k) of every cross attention between two groups."""
    group_of = {join: group for stream, group in zip(streams, groups, strict=True) for join in stream.joins}
    reads: set[tuple[int, int]] = set()
    for one in attentions:
        if one.kind != "cross" or not one.role("q") or not one.role("k"):
            continue
        pair: list[int] = []
        for role in ("q", "k"):
            stops = anatomy.frontier(one.role(role)[0].projection.input).stops
            joins = [anatomy.join_at[stop] for stop in stops if stop in anatomy.join_at]
            near = [group_of[join] for join in joins if join in group_of]
            after = _reading(anatomy, one, group_of) if role == "q" and not near else None
            pair += near[:1] or ([] if after is None else [after])
        if len(pair) == 2 and pair[0] != pair[1]:
            reads.add((pair[0], pair[1]))
    return reads


def _reading(anatomy: Anatomy, one: Attention, group_of: dict[Join, int]) -> int | None:
    """Return the group of the join that a cross attention enters."""
    flow = anatomy.flow
    after = (join for join in anatomy.joins if flow.descends(join.branch, one.core.output))
    return next((group_of[join] for join in after if join in group_of), None)


def _groups(anatomy: Anatomy, streams: Sequence[Stream], sublayers: dict[Join, list[Sublayer]]) -> list[int]:
    """Assign streams to stacks, by number: streams of one stack start where another ended, or attend jointly with
    it."""
    flow = anatomy.flow
    inputs = sum(flow.bit(node) for node in flow.nodes if node.op == "placeholder")
    groups: list[int] = []
    cores = [set(_cores(stream.joins, sublayers)) for stream in streams]
    read = [reduce(or_, (flow.before(join.node) for join in stream.joins)) | ~inputs for stream in streams]
    for i, stream in enumerate(streams):
        root = stream.joins[0].root
        group = len(set(groups))
        for j in range(i - 1, -1, -1):
            goes_on = flow.descends(root, streams[j].joins[-1].node) and not flow.before(root) & ~read[j]
            if goes_on or cores[i] & cores[j]:
                group = groups[j]
                break
        groups.append(group)
    return groups
