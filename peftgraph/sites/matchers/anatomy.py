"""The parts of a graph before they have roles: projections, norms, cores, joins, and the frontier of a
value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.products import is_product, spelled
from peftgraph.sites.matchers.attention_cores import Core, find_cores
from peftgraph.sites.matchers.low_rank_paths import SidePath, find_side_paths
from peftgraph.sites.matchers.norms import Norm, find_norms
from peftgraph.sites.matchers.projections import Projection, projection
from peftgraph.sites.matchers.residual_adds import Join, find_joins


@dataclass(frozen=True, eq=False)
class Frontier:
    """The nearest projections behind a value, everything else the walk stopped at, the nodes between, and which of
    these are nonlinear (those of a norm are not)."""

    projections: tuple[Projection, ...]
    stops: tuple[fx.Node, ...]
    between: frozenset[fx.Node]
    bends: tuple[fx.Node, ...]

    @property
    def nonlinear(self) -> bool:
        return bool(self.bends)


def _sums(node: fx.Node) -> bool:
    """Tell whether a product sums over anything. One that does not weighs a value by others, as a multiplication."""
    named = spelled(node)
    return named is None or bool(named.summed(0)) or bool(named.summed(1))


class Anatomy:
    def __init__(self, graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> None:
        flow = self.flow = Flow(graph, tensors)
        self.projections: list[Projection] = []
        self.projection_at: dict[fx.Node, Projection] = {}
        self.products: set[fx.Node] = set()
        self.convolutions: list[fx.Node] = []
        for node in flow.nodes:
            self._classify(node)
        self.side_paths: list[SidePath] = find_side_paths(flow, self.projections, self.projection_at)
        self._beside: set[Projection] = {path.up for path in self.side_paths}
        self._projection_mask = sum(flow.bit(one.node) for one in self.projections)
        self.norms: list[Norm] = find_norms(flow)
        self.norm_at: dict[fx.Node, Norm] = {norm.output: norm for norm in self.norms}
        self.cores, self.misses = find_cores(flow, set(self.projection_at))
        self.core_at: dict[fx.Node, Core] = {core.output: core for core in self.cores}
        self.routers: set[Projection] = set()
        self.joins: list[Join] = find_joins(flow, self.heavy, self.norm_at, self.core_at.keys())
        self.join_at: dict[fx.Node, Join] = {join.node: join for join in self.joins}
        self._norm_inside = self._inside_norms()
        self._frontiers: dict[fx.Node, Frontier] = {}

    def add_cores(self, more: Sequence[Core]) -> None:
        """Take in attention cores that only the finished anatomy could tell: those without a softmax."""
        self.cores = sorted([*self.cores, *more], key=lambda core: self.flow.order[core.output])
        self.core_at = {core.output: core for core in self.cores}

    def _classify(self, node: fx.Node) -> None:
        kind = ops.name(node)
        if kind not in ops.CONTRACTION | ops.CONV:
            return
        found = projection(self.flow, node)
        if found is not None:
            self.projections.append(found)
            self.projection_at[found.node] = self.projection_at[found.output] = found
        elif kind in ops.CONV:
            self.convolutions.append(node)
        elif is_product(self.flow, node) and _sums(node):
            self.products.add(node)

    @cached_property
    def heavy(self) -> int:
        """The nodes that make a value more than a re-shaped, re-scaled copy."""
        mask = 0
        for node in self.flow.nodes:
            if node in self.products or ops.name(node) in ops.SDPA | ops.CONV | ops.POOLING:
                mask |= self.flow.bit(node)
        for found in self.projections:
            mask |= self.flow.bit(found.node)
        return mask

    def _inside_norms(self) -> set[fx.Node]:
        inside: set[fx.Node] = set()
        for norm in self.norms:
            todo = [norm.output]
            while todo:
                node = todo.pop()
                if node is norm.input or node in inside or not self.flow.descends(node, norm.input):
                    continue
                inside.add(node)
                todo.extend(self.flow.operands(node))
        return inside

    def stops_at(self, node: fx.Node) -> bool:
        """Tell whether a walk that searches for projections ends at a node without one."""
        if self.flow.channelwise(node):
            return False
        return (
            node in self.join_at
            or node in self.core_at
            or node in self.products
            or node.op in ("placeholder", "get_attr")
            or not ops.CONTRACTION.isdisjoint(node.meta.get("operators", ()))  # an autograd function that mixes
            or ops.name(node) in ops.CONV | ops.POOLING | ops.SDPA | {"embedding", "embedding_bag"}
        )

    def _projected(self, node: fx.Node) -> bool:
        """Tell whether a projection comes before a constant, as learned latents are projected to queries."""
        return bool(self.flow.before(node) & self._projection_mask)

    def frontier(self, node: fx.Node) -> Frontier:
        if node not in self._frontiers:
            self._frontiers[node] = self._walk(node)
        return self._frontiers[node]

    def _walk(self, start: fx.Node) -> Frontier:
        projections: dict[Projection, None] = {}
        stops: dict[fx.Node, None] = {}
        between: set[fx.Node] = set()
        todo, seen = [start], set[fx.Node]()
        while todo:
            node = todo.pop()
            if node in seen or not self.flow.floating(node):
                continue
            seen.add(node)
            if node in self.projection_at:
                if self.projection_at[node] not in self._beside:
                    projections[self.projection_at[node]] = None
            elif self.flow.constant(node) and ops.name(node) != "embedding" and not self._projected(node):
                continue
            elif self.stops_at(node):
                stops[node] = None
            else:
                between.add(node)
                todo.extend(self.flow.operands(node))
        order = self.flow.order
        return Frontier(
            tuple(sorted(projections, key=lambda one: order[one.node])),
            tuple(sorted(stops, key=lambda one: order[one])),
            frozenset(between),
            tuple(node for node in between if ops.bends(node) and node not in self._norm_inside),
        )
