"""find_sites: from a canonical graph to its sites. Structure is the only evidence; paths are for display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import fx

from peftgraph.sites.assign.absent import find_absent
from peftgraph.sites.assign.attention import Attention, Part, arrivals, attended, find_attention, find_latents
from peftgraph.sites.assign.attention_ports import operands_of
from peftgraph.sites.assign.blocks import Blocks, Place, Sublayer
from peftgraph.sites.assign.collect import Collection, Ports, common, owner
from peftgraph.sites.assign.feedforward import FeedForward, find_feedforward
from peftgraph.sites.assign.naming import module_of
from peftgraph.sites.assign.routers import find_routers
from peftgraph.sites.assign.stored_tensors import add_biases, add_embeddings, add_weights
from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.tags import varies
from peftgraph.sites.explanations.origin import Origin
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.norms import Norm
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.matchers.residual_adds import Join
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.sites.patterns.search import PatternSearch, search
from peftgraph.sites.site import Bias, NearMiss, Sites

DOWN, UP = "side.down", "side.up"


def find_sites(
    graph: fx.Graph,
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, str] = MappingProxyType({}),
    *,
    patterns: Sequence[Pattern] = (),
    parameters: Set[str] | None = None,
) -> Sites:
    """The sites of a canonical graph.

    Args:
        graph: what to search.
        tensors: the parameters and buffers its get_attr nodes name.
        sizes: the printed names of symbolic sizes, for explanations.
        patterns: sites of one's own to look for as well.
        parameters: the names in `tensors` that are parameters and no buffers; all of them by default.
    """
    with torch.device("cpu"):  # tags are real numbers, whatever device the caller made the default
        found = Finder(Anatomy(graph, tensors), parameters).sites(patterns)
    return replace(found, origin=Origin.of(graph, tensors, sizes))


class Finder:
    """Collects the sites of one graph, role by role."""

    def __init__(self, anatomy: Anatomy, parameters: Set[str] | None = None) -> None:
        self.anatomy = anatomy
        self.parameters = frozenset(anatomy.flow.tensors) if parameters is None else parameters
        self.flow = anatomy.flow
        self.attentions, self.misses = find_attention(anatomy)
        self.misses = [*anatomy.misses, *self.misses]
        taken = {part.projection for one in self.attentions for part in one.parts}
        anatomy.routers = find_routers(anatomy, taken)
        self.feedforwards = self._feedforwards(taken)
        self.blocks = Blocks(anatomy, self.attentions, self.feedforwards)
        self.norm_after = {self.flow.strip(norm.input): norm for norm in reversed(anatomy.norms)}
        self.into = Collection(anatomy, self.blocks)

    def _feedforwards(self, taken: set[Projection]) -> list[FeedForward]:
        found: list[FeedForward] = []
        roots = attended(self.anatomy, self.attentions)
        for join in self.anatomy.joins:
            one, misses = find_feedforward(self.anatomy, join, taken, roots)
            self.misses += misses
            if one is not None:
                found.append(one)
        return found

    def sites(self, patterns: Sequence[Pattern] = ()) -> Sites:
        for one in self.attentions:
            self._attention(one)
        for one, latent in find_latents(self.anatomy, self.attentions):
            self.into.part(latent, self.into.place(latent.projection.node), kind=one.kind)
        for one in self.feedforwards:
            self._feedforward(one)
        self._leftovers()
        self._sublayers()
        self._norms()
        add_embeddings(self.into)
        add_weights(self.into, self.parameters)
        add_biases(self.into)
        searched = tuple(self._pattern(pattern) for pattern in patterns)
        return Sites(self.into.in_order(), tuple(self.misses), searched, absent=tuple(find_absent(self)))

    def _attention(self, one: Attention) -> None:
        ends = [part.projection.node for part in one.role("o")] or [one.core.output]
        place = self.into.place(ends[0])
        for part in one.parts:
            if (part.role, part.projection.node, part.columns) not in self.into.played:
                self.into.part(part, place if len(ends) == 1 else self._among(part, ends), kind=one.kind)
        core, q = one.core, one.role("q")
        if core.linear:
            return  # there is no softmax to put keys beside
        ports, axes = operands_of(self.anatomy, one)
        path = common([owner(part.weight.parameter, part.weight.experts) for part in one.parts])
        heads = q[0].heads if q else None
        reads = self.into.weights([part.projection.node for part in one.parts])
        more = {"heads": heads, "axis_items": tuple(axes.items()), "reads": reads}
        self.into.add("attention.core", core.node, path, place, ports, kind=one.kind, **more)

    def _among(self, part: Part, ends: Sequence[fx.Node]) -> Place | None:
        """The place of a part of attention over several streams: that of the stream the part reads."""
        node = part.projection.node
        if node in ends:
            return self.into.place(node)
        joins = [join for end in ends if (join := self.blocks.around(end)) is not None]
        own = [join for join in joins if self.flow.descends(node, join.source)]
        return self.blocks.places.get(own[0]) if own else self.into.place(ends[0])

    def _feedforward(self, one: FeedForward) -> None:
        place = self.blocks.places.get(one.join)
        experts = self._experts(one)
        for part in one.parts:
            self.into.part(part, place, **experts.get(part.projection, {}))
        for down in one.downs:
            weight = Part("ffn.hidden", down, None).weight
            self.into.add(
                "ffn.hidden",
                down.node,
                owner(weight.parameter, weight.experts),
                place,
                {"input": down.input, "output": down.input, "offsets": down.offsets, "chosen": down.chosen},
                weight=weight,
                feature_axis=down.input_axis,
                equation=down.equation,
                form=down.form,
                shape=weight.shape(self.flow.tensors),
                **{"expert": down.expert, **experts.get(down, {})},
            )

    def _experts(self, one: FeedForward) -> dict[Projection, dict[str, object]]:
        """Several downs of one shape on one join, weighed by a router, are experts by number."""
        routed = self._routed(one.join)
        alike = [down for down in one.downs if down.weight.experts is None and down.width == one.downs[0].width]
        shapes = [down.weight.shape(self.flow.tensors) for down in alike]
        numbered_downs = [d for d, shape in zip(alike, shapes, strict=True) if shapes.count(shape) > 1]
        if not routed or len(numbered_downs) < 2:
            return {}
        numbers: dict[Projection, dict[str, object]] = {}
        for number, down in enumerate(numbered_downs):
            for member in (down, *self.anatomy.frontier(down.input).projections):
                numbers[member] = {"expert": number}
        return numbers

    def _routed(self, join: Join) -> bool:
        return any(
            self.flow.descends(join.branch, router.node) and self.flow.descends(router.node, join.source)
            for router in self.anatomy.routers
        )

    def _leftovers(self) -> None:
        """Projections without a role: routers, heads (nothing follows but the output), and the rest."""
        taken = {site.op for site in self.into.found}
        anatomy, flow = self.anatomy, self.flow
        joined = 0
        for node in [*(join.node for join in anatomy.joins), *(core.node for core in anatomy.cores)]:
            joined |= flow.before(node)
        read = 0
        for one in anatomy.projections:
            read |= flow.before(one.node)
        beside = {one: role for path in anatomy.side_paths for one, role in ((path.down, DOWN), (path.up, UP))}
        for one in anatomy.projections:
            if one.node.name in taken:
                continue
            last = not (joined | read) & flow.bit(one.node)
            plain = "router" if one in anatomy.routers else "head" if last else "projection"
            role = beside.get(one, plain)
            self.into.part(Part(role, one, None), None if role == "head" else self.into.place(one.node))

    def _sublayers(self) -> None:
        blocks = self.blocks
        for sublayers in blocks.sublayers.values():
            for one in sublayers:
                self._sublayer(one, parallel=len(blocks.roles_from[one.join.source]) > 1)
        for stream in blocks.streams:
            for start, stop in stream.blocks:
                joins = stream.joins[start:stop]
                ports: Ports = {"input": joins[0].skip, "output": self._after(joins[-1])}
                members = [n for join in joins for one in blocks.sublayers[join] for n in one.members]
                place = blocks.places[joins[0]]
                path, axis = self.into.common(members, joins[-1].node), self._feature_axis(members, joins[-1].node)
                reads = self.into.weights(members)
                self.into.add("block", joins[-1].node, path, place, ports, feature_axis=axis, reads=reads)

    def _sublayer(self, one: Sublayer, parallel: bool) -> None:
        join = one.join
        normed = self._after(join) if join in self.blocks.post else None
        ports: Ports = {
            "input": one.input,
            "memory": one.memory,
            "residual": join.skip,
            "output": one.output,
            "join": join.node,
            "normed": normed if normed is not join.node else None,
        }
        self.into.add(
            one.role,
            join.node,
            self.into.common(one.members, join.node),
            self.blocks.places.get(join),
            ports,
            kind=one.kind,
            layout=self.blocks.layout(one),
            parallel=parallel,
            feature_axis=self._feature_axis(one.members, one.output),
            reads=self.into.weights(one.members),
        )

    def _feature_axis(self, members: Sequence[fx.Node], value: fx.Node) -> int:
        """The axis of a value, from the end, along which the features of the last projection before it are."""
        flow, known = self.flow, self.anatomy.projection_at
        before = [known[node] for node in members if node in known and flow.descends(value, known[node].output)]
        if not before:
            return -1
        last = max(before, key=lambda one: flow.order[one.node])
        tags, _ = arrivals(self.anatomy, value, [last])
        axes = [axis for axis in range(-tags.dim(), 0) if varies(tags, axis)]
        return axes[0] if len(axes) == 1 else -1

    def _after(self, join: Join) -> fx.Node:
        """The value a block hands on: the join, or the norm after it in a post-norm stream."""
        if join in self.blocks.post:
            norm = self.norm_after.get(join.node)
            return join.node if norm is None else norm.output
        return join.node

    def _norms(self) -> None:
        joined = {join.node: join for join in self.anatomy.joins}
        for norm in self.anatomy.norms:
            before = joined.get(self.flow.strip(norm.input))
            post = before is not None and before in self.blocks.post
            place = self.blocks.places.get(before) if post and before else self.into.place(norm.output)
            if place is None and not post:
                place = self._operand_place(norm)
            self.into.place_of[norm.node] = place
            bias = None if norm.bias is None else Bias(norm.bias)
            path = owner(norm.weight) if norm.weight else module_of(norm.node)
            by_channel = ops.name(norm.node) in ops.IMAGE_NORM
            self.into.add(
                "norm",
                norm.node,
                path,
                place,
                {"input": norm.input, "output": norm.output},
                bias=bias,
                scale=norm.weight,
                feature_axis=1 - len(self.flow.shape(norm.output)) if by_channel else -1,
            )

    def _operand_place(self, norm: Norm) -> Place | None:
        """The layer of a norm on q or k whose projection reads another stream."""
        sources = self.anatomy.frontier(norm.input).projections
        places = [self.into.place_of[one.node] for one in sources if one.node in self.into.place_of]
        return places[0] if places else None

    def _pattern(self, pattern: Pattern) -> PatternSearch:
        found, report = search(self.anatomy, pattern)
        for one in found:
            place = self.into.place(one.node)
            if one.part is not None:
                self.into.part(one.part, place, tags=one.tags, values=one.values)
            else:
                self.into.value(one.role, one.node, place, tags=one.tags, values=one.values)
        return report


__all__ = ["NearMiss", "find_sites"]
