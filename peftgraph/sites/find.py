"""find_sites: from a canonical graph to its sites. Structure is the only evidence; paths are for display."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from . import ops
from .anatomy import Anatomy
from .attention import Attention, Part, attended, find_attention, find_latents
from .blocks import Blocks, Place, Sublayer
from .feedforward import FeedForward, find_feedforward
from .grouped import rows_by_head
from .joins import Join
from .naming import module_of
from .norms import Norm
from .origin import Origin
from .patterns.pattern import Pattern
from .patterns.search import PatternSearch, search
from .projections import Projection
from .routers import find_routers
from .site import Bias, Columns, NearMiss, Site, Sites

DOWN, UP = "side.down", "side.up"
RANK = (
    "block",
    "attention",
    "ffn",
    "norm",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.core",
    "attention.o",
    "attention.latent",
    "ffn.gate",
    "ffn.up",
    "ffn.hidden",
    "ffn.down",
    "router",
    DOWN,
    UP,
    "projection",
    "head",
    "embedding",
    "bias",
)


def find_sites(
    graph: fx.Graph,
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, str] = MappingProxyType({}),
    *,
    patterns: Sequence[Pattern] = (),
) -> Sites:
    """The sites of a canonical graph.

    Args:
        graph: what to search.
        tensors: the parameters and buffers its get_attr nodes name.
        sizes: the printed names of symbolic sizes, for explanations.
        patterns: sites of one's own to look for as well.
    """
    with torch.device("cpu"):  # tags are real numbers, whatever device the caller made the default
        found = Finder(Anatomy(graph, tensors)).sites(patterns)
    return replace(found, origin=Origin.of(graph, tensors, sizes))


class Finder:
    """Collects the sites of one graph, role by role."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.flow = anatomy.flow
        self.attentions, self.misses = find_attention(anatomy)
        self.misses = [*anatomy.misses, *self.misses]
        taken = {part.projection for one in self.attentions for part in one.parts}
        anatomy.routers = find_routers(anatomy, taken)
        self.feedforwards = self._feedforwards(taken)
        self.blocks = Blocks(anatomy, self.attentions, self.feedforwards)
        self.norm_after = {self.flow.strip(norm.input): norm for norm in reversed(anatomy.norms)}
        self.found: list[Site] = []
        self.paths: dict[str, list[str]] = {}  # of the sites with a weight, by operation
        self.played: set[tuple[str, fx.Node, Columns | None]] = set()  # the parts that are sites already
        self.place_of: dict[fx.Node, Place | None] = {}

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
            self._part(latent, self._place(latent.projection.node), kind=one.kind)
        for one in self.feedforwards:
            self._feedforward(one)
        self._leftovers()
        self._sublayers()
        self._norms()
        self._embeddings()
        self._biases()
        searched = tuple(self._pattern(pattern) for pattern in patterns)
        order = {node.name: i for i, node in enumerate(self.flow.nodes)}
        rank = {role: i for i, role in enumerate(RANK)}
        self.found.sort(key=lambda site: (order[site.op], rank.get(site.role, len(RANK))))
        items = tuple(numbered(self.found))
        return Sites(items, tuple(self.misses), searched)

    def _add(self, role: str, op: fx.Node, path: str, place: Place | None, ports: Ports, **more: Any) -> None:
        items = tuple((port, node.name) for port, node in ports.items() if node is not None)
        where = {} if place is None else {"layer": place.layer, "depth": place.depth, "stack": place.stack}
        self.found.append(Site(role=role, path=path, op=op.name, port_items=items, **where, **more))
        if self.found[-1].weight is not None:
            self.paths.setdefault(op.name, []).append(path)

    def _place(self, node: fx.Node) -> Place | None:
        join = self.blocks.around(node)
        return self.blocks.places.get(join) if join is not None else None

    def _part(self, part: Part, place: Place | None, **more: Any) -> None:
        """A site for one part of a projection."""
        one = part.projection
        self.played.add((part.role, one.node, part.columns))
        self.place_of.setdefault(one.node, place)
        ports: Ports = {
            "input": one.input,
            "output": one.output,
            "offsets": one.offsets,
            "chosen": one.chosen,
        }
        weight = part.weight
        self._add(
            part.role,
            one.node,
            owner(weight.parameter, weight.experts),
            place,
            ports,
            columns=part.columns,
            weight=weight,
            bias=part.bias,
            heads=part.heads,
            head_dim=part.head_dim,
            feature_axis=feature_axis(self.flow.shape(one.output), one),
            note=part.note,
            shape=weight.shape(self.flow.tensors),
            **{"expert": one.expert, **more},
        )

    def _attention(self, one: Attention) -> None:
        ends = [part.projection.node for part in one.role("o")] or [one.core.output]
        place = self._place(ends[0])
        for part in one.parts:
            if (part.role, part.projection.node, part.columns) not in self.played:
                self._part(part, place if len(ends) == 1 else self._among(part, ends), kind=one.kind)
        core, q = one.core, one.role("q")
        ports: Ports = {"q": core.q, "k": core.k, "v": core.v, "output": core.output, "mask": core.mask}
        ports |= {f"product{i}" if i else "product": node for i, node in enumerate(core.products)}
        ports |= {"keys": rows_by_head(self.flow, core.k), "values": rows_by_head(self.flow, core.v)}
        path = common([owner(part.weight.parameter, part.weight.experts) for part in one.parts])
        heads = q[0].heads if q else None
        self._add("attention.core", core.node, path, place, ports, kind=one.kind, heads=heads)

    def _among(self, part: Part, ends: Sequence[fx.Node]) -> Place | None:
        """The place of a part of attention over several streams: that of the stream the part reads."""
        node = part.projection.node
        if node in ends:
            return self._place(node)
        joins = [join for end in ends if (join := self.blocks.around(end)) is not None]
        own = [join for join in joins if self.flow.descends(node, join.source)]
        return self.blocks.places.get(own[0]) if own else self._place(ends[0])

    def _feedforward(self, one: FeedForward) -> None:
        place = self.blocks.places.get(one.join)
        experts = self._experts(one)
        for part in one.parts:
            self._part(part, place, **experts.get(part.projection, {}))
        for down in one.downs:
            weight = Part("ffn.hidden", down, None).weight
            self._add(
                "ffn.hidden",
                down.node,
                owner(weight.parameter, weight.experts),
                place,
                {"input": down.input, "output": down.input, "offsets": down.offsets, "chosen": down.chosen},
                weight=weight,
                feature_axis=down.input_axis,
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
        taken = {site.op for site in self.found}
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
            self._part(Part(role, one, None), None if role == "head" else self._place(one.node))

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
                self._add("block", joins[-1].node, self._common(members, joins[-1].node), place, ports)

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
        self._add(
            one.role,
            join.node,
            self._common(one.members, join.node),
            self.blocks.places.get(join),
            ports,
            kind=one.kind,
            layout=self.blocks.layout(one),
            parallel=parallel,
        )

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
            place = self.blocks.places.get(before) if post and before else self._place(norm.output)
            if place is None and not post:
                place = self._operand_place(norm)
            self.place_of[norm.node] = place
            bias = None if norm.bias is None else Bias(norm.bias)
            path = owner(norm.weight) if norm.weight else module_of(norm.node)
            self._add(
                "norm",
                norm.node,
                path,
                place,
                {"input": norm.input, "output": norm.output},
                bias=bias,
                scale=norm.weight,
            )

    def _operand_place(self, norm: Norm) -> Place | None:
        """The layer of a norm on q or k whose projection reads another stream."""
        sources = self.anatomy.frontier(norm.input).projections
        places = [self.place_of[one.node] for one in sources if one.node in self.place_of]
        return places[0] if places else None

    def _embeddings(self) -> None:
        for node in self.flow.nodes:
            if ops.name(node) not in ("embedding", "embedding_bag") or not _looks_up_input(self.flow.operands(node)[1]):
                continue
            leaf = self.flow.leaf(self.flow.operands(node)[0])
            if leaf is not None:
                self._embedding(node, str(leaf.target), self.flow.operands(node)[1])

    def _embedding(self, node: fx.Node, parameter: str, index: fx.Node) -> None:
        from .site import Weight

        weight = Weight(parameter, transposed=True)
        ports: Ports = {"input": index, "output": node}
        shape = weight.shape(self.flow.tensors)
        self._add(
            "embedding", node, owner(parameter), None, ports, weight=weight, shape=shape, stack=self._fed_by(node)
        )

    def _fed_by(self, node: fx.Node) -> str | None:
        """The first stack whose stream starts from what `node` gives."""
        fed = (
            place.stack
            for join, place in sorted(self.blocks.places.items(), key=lambda item: self.flow.order[item[0].node])
            if self.flow.descends(join.root, node)
        )
        return next(fed, None)

    def _biases(self) -> None:
        """Every additive bias vector, at every use."""
        for parameter, op, output, place in self._bias_uses():
            shape = tuple(int(size) for size in self.flow.tensors[parameter].shape)
            self._add("bias", op, parameter, place, {"output": output}, bias=Bias(parameter), shape=shape)

    def _bias_uses(self) -> Iterable[tuple[str, fx.Node, fx.Node, Place | None]]:
        flow, seen = self.flow, set[fx.Node]()
        for one in self.anatomy.projections:
            seen |= {one.node, one.output}
            if one.bias is not None:
                yield one.bias.parameter, one.node, one.output, self.place_of.get(one.node)
        for norm in self.anatomy.norms:
            seen |= {norm.node, norm.output}
            if norm.bias is not None:
                yield norm.bias, norm.node, norm.output, self.place_of.get(norm.node)
        for node in flow.nodes:
            vector = None
            if ops.name(node) in ops.CONV:
                vector = ops.operand(node, 2, "bias")
            elif ops.name(node) == "add" and not flow.constant(node):  # a gain of 1 + w is no bias
                vector = next((one for one in flow.operands(node) if flow.raw(one)), None)
            leaf = None if vector is None else flow.leaf(vector)
            if node not in seen and leaf is not None and flow.floating(leaf) and len(flow.shape(leaf)) == 1:
                yield str(leaf.target), node, node, self._place(node)

    def _pattern(self, pattern: Pattern) -> PatternSearch:
        found, report = search(self.anatomy, pattern)
        for one in found:
            place = self._place(one.node)
            if one.part is not None:
                self._part(one.part, place, tags=one.tags, values=one.values)
            else:
                self._value(one.role, one.node, place, tags=one.tags, values=one.values)
        return report

    def _value(self, role: str, node: fx.Node, place: Place | None, **more: Any) -> None:
        """A site for a pattern's value that is no projection: a norm with what it trains, or a plain value."""
        norm = self.anatomy.norm_at.get(node)
        inputs = [one for one in self.flow.operands(node) if self.flow.signal(one)]
        ports: Ports = {"input": norm.input if norm else inputs[0] if inputs else None, "output": node}
        bias = None if norm is None or norm.bias is None else Bias(norm.bias)
        scale = None if norm is None else norm.weight
        axis = 1 - len(self.flow.shape(node)) if ops.name(node) in ops.CONV else -1
        path = owner(scale) if scale else module_of(node)
        self._add(role, node, path, place, ports, bias=bias, scale=scale, feature_axis=axis, **more)

    def _common(self, members: Sequence[fx.Node], fallback: fx.Node) -> str:
        paths = [path for node in dict.fromkeys(members) for path in self.paths.get(node.name, ())]
        return common(paths) if paths else module_of(fallback)


Ports = dict[str, fx.Node | None]


def _looks_up_input(index: fx.Node) -> bool:
    """An index that is an input, up to layout, casts and masking; positions, counted or given, are none."""
    through = ops.LAYOUT | ops.CAST | {"masked_fill", "where", "clamp", "copy", "new_zeros", "fill", "clamp_min"}
    todo, seen = [index], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return not node.meta.get("fill")
        if node not in seen and ops.name(node) in through:
            seen.add(node)
            todo.extend(node.all_input_nodes if ops.name(node) != "where" else node.all_input_nodes[1:])
    return False


def owner(parameter: str, experts: int | None = None) -> str:
    """The module that owns a parameter; a stack of experts is its own owner."""
    return parameter.rpartition(".")[0] or parameter if experts is None else parameter


def common(paths: Sequence[str]) -> str:
    """The longest common module path."""
    parts = [path.split(".") for path in paths]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def feature_axis(shape: tuple[int, ...], one: Projection) -> int:
    """The axis of the output that holds the features (the first, where there are several), from the end."""
    axis = one.axes[0]
    return axis if axis < 0 else axis - len(shape)


def numbered(found: Sequence[Site]) -> list[Site]:
    """Number the sites that would share a name."""
    counts: dict[str, int] = {}
    for site in found:
        counts[site.id] = counts.get(site.id, 0) + 1
    seen: dict[str, int] = {}
    result: list[Site] = []
    for site in found:
        if counts[site.id] > 1:
            serial = seen.get(site.id, 0)
            seen[site.id] = serial + 1
            site = replace(site, serial=serial)
        result.append(site)
    return result


__all__ = ["NearMiss", "find_sites"]
