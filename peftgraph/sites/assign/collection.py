"""The collection of sites while they are found: what belongs in every site, whatever its role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from peftgraph.sites.assign.attention import ProjectionPart
from peftgraph.sites.assign.blocks import Blocks, Place
from peftgraph.sites.assign.naming import module_of
from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.projections import Projection
from peftgraph.sites.roles import ROLES
from peftgraph.sites.site import Bias, Columns, Site

Ports = dict[str, fx.Node | None]


class Collection:
    """Hold the sites found so far, and in which layer each operation stands."""

    def __init__(self, anatomy: Anatomy, blocks: Blocks) -> None:
        self.anatomy, self.flow, self.blocks = anatomy, anatomy.flow, blocks
        self.found: list[Site] = []
        self.paths: dict[str, list[str]] = {}  # of the sites with a weight, by operation
        self.stored: dict[str, list[str]] = {}  # their weights, by operation
        self.played: set[tuple[str, fx.Node, Columns | None]] = set()  # the parts that are sites already
        self.place_of: dict[fx.Node, Place | None] = {}

    def in_order(self) -> tuple[Site, ...]:
        """Return the sites in the order of the graph, those of one name numbered."""
        order = {node.name: i for i, node in enumerate(self.flow.nodes)}
        last = 1 + max(one.rank for one in ROLES)
        ranks = {one.name: one.rank for one in ROLES}
        self.found.sort(key=lambda site: (order[site.op], ranks.get(site.role, last)))
        return tuple(_numbered(self.found))

    def add(self, role: str, op: fx.Node, path: str, place: Place | None, ports: Ports, **more: Any) -> None:
        items = named(ports)
        where = {} if place is None else {"layer": place.layer, "depth": place.depth, "stack": place.stack}
        self.found.append(Site(role=role, path=path, op=op.name, port_items=items, **where, **more))
        if self.found[-1].weight is not None:
            self.paths.setdefault(op.name, []).append(path)
            self.stored.setdefault(op.name, []).append(self.found[-1].weight.parameter)

    def place(self, node: fx.Node) -> Place | None:
        join = self.blocks.around(node)
        return self.blocks.places.get(join) if join is not None else None

    def part(self, part: ProjectionPart, place: Place | None, **more: Any) -> None:
        """Add a site for one part of a projection."""
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
        self.add(
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
            feature_axis=_feature_axis(self.flow.shape(one.output), one),
            equation=one.equation,
            form=one.form,
            note=part.note,
            shape=weight.shape(self.flow.tensors),
            **{"expert": one.expert, **more},
        )

    def value(self, role: str, node: fx.Node, place: Place | None, **more: Any) -> None:
        """Add a site for a pattern's value that is no projection: a norm with what it trains, or a plain value."""
        norm = self.anatomy.norm_at.get(node)
        inputs = [one for one in self.flow.operands(node) if self.flow.signal(one)]
        ports: Ports = {"input": norm.input if norm else inputs[0] if inputs else None, "output": node}
        bias = None if norm is None or norm.bias is None else Bias(norm.bias)
        scale = None if norm is None else norm.weight
        axis = 1 - len(self.flow.shape(node)) if ops.name(node) in ops.CONV else -1
        path = owner(scale) if scale else module_of(node)
        self.add(role, node, path, place, ports, bias=bias, scale=scale, feature_axis=axis, **more)

    def weights(self, members: Sequence[fx.Node]) -> tuple[str, ...]:
        """Return the stored weights of some operations."""
        return tuple(dict.fromkeys(name for node in members for name in self.stored.get(node.name, ())))

    def common(self, members: Sequence[fx.Node], fallback: fx.Node) -> str:
        paths = [path for node in dict.fromkeys(members) for path in self.paths.get(node.name, ())]
        return common(paths) if paths else module_of(fallback)


def named(ports: Ports) -> tuple[tuple[str, str], ...]:
    """Return ports with the names of their nodes, without those that are not there."""
    return tuple((port, node.name) for port, node in ports.items() if node is not None)


def owner(parameter: str, experts: int | None = None) -> str:
    """Return the module that owns a parameter; a stack of experts is its own owner."""
    return parameter.rpartition(".")[0] or parameter if experts is None else parameter


def common(paths: Sequence[str]) -> str:
    """Return the longest common module path."""
    parts = [path.split(".") for path in paths]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _feature_axis(shape: tuple[int, ...], one: Projection) -> int:
    """Return the axis of the output that holds the features (the first, where there are several), from the end."""
    axis = one.axes[0]
    return axis if axis < 0 else axis - len(shape)


def _numbered(found: Sequence[Site]) -> list[Site]:
    """Give sites that would share a name a serial number each."""
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
