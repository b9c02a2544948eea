"""The structure of a graph: its attentions, feed-forwards and blocks, and the collection that finders add sites to."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import fx

from peftgraph.sites.assign.attention import attended, find_attention
from peftgraph.sites.assign.blocks import Blocks
from peftgraph.sites.assign.collection import Collection
from peftgraph.sites.assign.feedforward import FeedForward, find_feedforward
from peftgraph.sites.assign.linear_attention import find_linear
from peftgraph.sites.assign.routers import find_routers
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.matchers.residual_adds import Join


class Structure:
    """What a graph is made of, worked out once; finders turn it into sites.

    Attributes:
        anatomy: projections, norms, attention cores and residual adds.
        flow: the dataflow of the graph.
        parameters: the names of stored tensors that are parameters and no buffers.
        attentions: the attentions, each with the parts of projections that it is made of.
        feedforwards: the feed-forwards.
        misses: how far searches came that found nothing.
        blocks: the sublayers on every residual stream, cut into layers.
        into: the sites found so far.
    """

    def __init__(
        self, graph: fx.Graph, tensors: Mapping[str, torch.Tensor], parameters: Set[str] | None = None
    ) -> None:
        anatomy = self.anatomy = Anatomy(graph, tensors)
        anatomy.add_cores(find_linear(anatomy))
        self.flow = anatomy.flow
        self.parameters = frozenset(self.flow.tensors) if parameters is None else parameters
        self.attentions, misses = find_attention(anatomy)
        self.misses = [*anatomy.misses, *misses]
        taken = {part.projection for one in self.attentions for part in one.parts}
        anatomy.routers = find_routers(anatomy, taken)
        self.feedforwards = self._feedforwards(taken)
        self.blocks = Blocks(anatomy, self.attentions, self.feedforwards)
        self.norm_after = {self.flow.strip(norm.input): norm for norm in reversed(anatomy.norms)}
        self.into = Collection(anatomy, self.blocks)
        self._nodes = {node.name: node for node in self.flow.nodes}

    def _feedforwards(self, taken: set[Projection]) -> list[FeedForward]:
        found: list[FeedForward] = []
        roots = attended(self.anatomy, self.attentions)
        for join in self.anatomy.joins:
            one, misses = find_feedforward(self.anatomy, join, taken, roots)
            self.misses += misses
            if one is not None:
                found.append(one)
        return found

    def after(self, join: Join) -> fx.Node:
        """Return the value a block hands on: the join, or the norm after it in a post-norm stream."""
        norm = self.norm_after.get(join.node) if join in self.blocks.post else None
        return join.node if norm is None else norm.output

    def node(self, name: str) -> fx.Node:
        """Return a node by its graph name."""
        return self._nodes[name]
