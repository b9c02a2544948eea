"""The nearest misses of a role: what the searches recorded, and what only somebody who asks wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from torch import fx

from peftgraph.sites.assign import feedforward
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.products import factors, is_product
from peftgraph.sites.matchers import attention_cores
from peftgraph.sites.matchers.norms import near_norm
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.matchers.residual_adds import near_join
from peftgraph.sites.site import NearMiss

if TYPE_CHECKING:
    from peftgraph.sites.assign.find import Finder

MIXING: Final = ops.CONV | ops.POOLING
READER: Final = ("an attention core", "a projection that reads its result, before any residual add")
SUBLAYER: Final = ("a down projection or an attention", "a residual add that its result enters")
GATE: Final = ("a down projection", "a multiplication of two values of different columns behind it")
LOOKUP: Final = ("a table lookup (embedding)", "an index that comes from an input")
ROUTER: Final = ("a projection", "a top-k of its result, or a softmax or sigmoid of it that weighs wider values")
LAST: Final = ("a projection", "no residual add, attention or other projection that reads what follows from it")


def near_misses(finder: Finder, role: str) -> list[NearMiss]:
    """What came closest to a role, best first; empty where nothing like it is in the graph."""
    found = [*_recorded(finder, role), *_searched(finder, role)]
    return sorted(found, key=lambda miss: -miss.passed / miss.total)


def _recorded(finder: Finder, role: str) -> list[NearMiss]:
    if not role.startswith("attention"):
        return [miss for miss in finder.misses if miss.role.startswith(role.partition(".")[0])]
    own = [miss for miss in finder.misses if miss.role == role]
    return own or [m for m in finder.misses if m.role.startswith("attention") and not finder.attentions]


def _searched(finder: Finder, role: str) -> Iterator[NearMiss]:
    family = role.partition(".")[0]
    if family == "attention" and (not finder.attentions or role == attention_cores.ROLE):
        yield from _linear_attention(finder)
    elif role == "attention.o":
        yield from _unread(finder)
    elif role == "attention":
        yield from _unjoined(finder)
    elif role == "ffn.gate" and finder.feedforwards:
        yield from _ungated(finder)
    elif family == "ffn":
        yield from _branchless(finder)
    elif family == "norm":
        yield from filter(None, (near_norm(finder.flow, node) for node in finder.flow.nodes))
    elif family == "block":
        anatomy = finder.anatomy
        found = anatomy.heavy, anatomy.join_at, anatomy.core_at.keys()
        yield from filter(None, (near_join(finder.flow, node, *found) for node in finder.flow.nodes))
    elif family == "embedding":
        yield from _lookups(finder)
    elif family == "router":
        yield from _weighing(finder)
    elif family == "head":
        yield from _last(finder)


def mixing(finder: Finder) -> list[fx.Node]:
    """What brings positions together in a net without attention."""
    return [node for node in finder.flow.nodes if node in finder.anatomy.convolutions or ops.name(node) in ops.POOLING]


def _linear_attention(finder: Finder) -> Iterator[NearMiss]:
    """Products of products: q (k^T v), or (q k^T) v without a softmax."""
    flow = finder.flow
    for node in flow.nodes:
        if not is_product(flow, node):
            continue
        inner = next((one for one in map(_behind_product(finder), factors(node) or ()) if one is not None), None)
        if inner is not None:
            way = flow.between(inner, node)
            shown = ", ".join(dict.fromkeys(ops.name(one) for one in way)) or "no operator"
            found = f"{shown} between %{inner.name} and %{node.name}, two products of signals (linear attention)"
            miss = NearMiss.at(attention_cores.ROLE, node, attention_cores.CONDITIONS, 0, found, inner, *way)
            yield replace(miss, passed=2)


def _behind_product(finder: Finder):
    flow = finder.flow
    through = ops.LAYOUT | ops.CAST | ops.SCALE | ops.MASKING | ops.DROPOUT

    def find(node: fx.Node) -> fx.Node | None:
        todo, seen = [node], set[fx.Node]()
        while todo:
            here = todo.pop()
            if is_product(flow, here):
                return here
            if here not in seen and ops.name(here) in through and flow.floating(here):
                seen.add(here)
                todo.extend(flow.operands(here))
        return None

    return find


def _unread(finder: Finder) -> Iterator[NearMiss]:
    """Cores whose result no projection reads."""
    for one in finder.attentions:
        if not one.role("o"):
            output = one.core.output
            readers = ", ".join(f"%{user.name} ({ops.name(user)})" for user in list(output.users)[:3]) or "no reader"
            yield NearMiss.at("attention.o", output, READER, 1, readers, one.core.node, *list(output.users)[:3])


def _unjoined(finder: Finder) -> Iterator[NearMiss]:
    """Attention that enters no residual add."""
    for one in finder.attentions:
        end = one.role("o")[0].projection.output if one.role("o") else one.core.output
        if not any(finder.flow.descends(join.branch, end) for join in finder.anatomy.joins):
            yield NearMiss.at("attention", end, SUBLAYER, 1, _readers(end), one.core.node, *list(end.users)[:3])


def _ungated(finder: Finder) -> Iterator[NearMiss]:
    for one in finder.feedforwards:
        for down in one.downs:
            between = sorted(finder.anatomy.frontier(down.input).between, key=finder.flow.order.__getitem__)
            shown = ", ".join(dict.fromkeys(ops.name(node) for node in between)) or "nothing"
            yield NearMiss.at("ffn.gate", down.node, GATE, 1, shown, *between)


def _branchless(finder: Finder) -> Iterator[NearMiss]:
    """Two projections and a nonlinearity whose result enters no residual add."""
    for one in finder.anatomy.projections:
        frontier = finder.anatomy.frontier(one.input)
        joined = any(finder.flow.descends(join.branch, one.output) for join in finder.anatomy.joins)
        if not joined and frontier.projections and frontier.nonlinear and not frontier.stops:
            between = sorted(frontier.between, key=finder.flow.order.__getitem__)
            sources = [source.node for source in frontier.projections]
            near = [*sources, *between, *list(one.output.users)[:3]]
            miss = NearMiss.at("ffn.down", one.node, feedforward.CONDITIONS, 0, _readers(one.output), *near)
            yield replace(miss, passed=3)


def _readers(node: fx.Node) -> str:
    users = [user for user in node.users if user.op != "output"]
    return ", ".join(f"%{user.name} ({ops.name(user)})" for user in users[:3]) or "the model's output"


def _lookups(finder: Finder) -> Iterator[NearMiss]:
    for node in finder.flow.nodes:
        if ops.name(node) in ("embedding", "embedding_bag"):
            index = finder.flow.operands(node)[1]
            yield NearMiss.at("embedding", node, LOOKUP, 1, f"%{index.name} ({ops.name(index)})", index)


def _weighing(finder: Finder) -> Iterator[NearMiss]:
    """Projections whose result is squashed, but weighs nothing."""
    for one in finder.anatomy.projections:
        for user in one.output.users:
            if ops.name(user) in ops.SOFTMAX or ops.name(user) == "sigmoid":
                yield NearMiss.at("router", one.node, ROUTER, 1, _readers(user), user, *list(user.users)[:3])


def _last(finder: Finder) -> Iterator[NearMiss]:
    """The last projection, and what reads it."""
    for one in finder.anatomy.projections[-1:]:
        reader = _follower(finder, one)
        if reader is not None:
            yield NearMiss.at("head", one.node, LAST, 1, f"%{reader.name} ({ops.name(reader)})", one.output, reader)


def _follower(finder: Finder, one: Projection) -> fx.Node | None:
    """The first residual add, core or projection after a projection."""
    anatomy, flow = finder.anatomy, finder.flow
    for node in flow.nodes[flow.order[one.output] + 1 :]:
        ends = node in anatomy.join_at or node in anatomy.core_at or node in anatomy.projection_at
        if ends and flow.descends(node, one.output):
            return node
    return None
