"""Collects the outline of a model from its sites. Where a norm stands is read from the dataflow, never from names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peftgraph.draw.mask_kinds import masks
from peftgraph.draw.model_outline import (
    BlockOutline,
    Component,
    LayerGroup,
    Outline,
    Slot,
    StackOutline,
    Sublayer,
    UnmatchedProjection,
)
from peftgraph.draw.nearest_sites import NearestSites, memory_reads, sites_around_stacks
from peftgraph.ir.program import ProgramData
from peftgraph.ir.tensor_table import TensorEntry
from peftgraph.sites import Site, Sites
from peftgraph.sites.roles import is_structure, with_slot

QKV = with_slot(("input",))


def outline(program: ProgramData, sites: Sites) -> Outline:
    """Return the outline of a program's model, before any pass."""
    return _Collector(program.base or program, sites).outline()


@dataclass(eq=False)
class _Slotted:
    """A sublayer while its sites are gathered, each with the slot of a norm."""

    site: Site | None
    order: int
    members: list[tuple[Site, Slot]] = field(default_factory=list)


class _Collector:
    def __init__(self, program: ProgramData, sites: Sites) -> None:
        self.program, self.sites = program, sites
        self.order = {node.name: place for place, node in enumerate(program.graph.nodes)}
        self.masks = masks(program.graph, sites)
        self.nearest = NearestSites(program.graph, sites)
        self.owned = {site.bias.parameter for site in sites if site.bias is not None and site.role != "bias"}
        self.tensors = program.table.tensors()
        self.holders: dict[str, list[Site]] = {}
        for site in sites:
            if site.weight is not None and site.role != "ffn.hidden":
                self.holders.setdefault(site.weight.parameter, []).append(site)

    def outline(self) -> Outline:
        layers: dict[str, dict[int, list[Site]]] = {}
        outside: list[Site] = []
        named = {one.pattern.name for one in self.sites.searched}
        for site in self.sites:
            if site.layer is not None and site.role not in named:
                layers.setdefault(site.stack or "", {}).setdefault(site.layer, []).append(site)
            elif self._shown(site):
                outside.append(site)
        places = sites_around_stacks(self.nearest, self.sites, outside, layers)

        def standing(stack: str | None, before: bool) -> tuple[Component, ...]:
            place = None if stack is None else (stack, before)
            return self._components((site, "") for site in outside if places.get(site.id) == place)

        stacks = tuple(
            StackOutline(name, standing(name, True), self._groups(numbered), standing(name, False))
            for name, numbered in layers.items()
        )
        return Outline(
            model=self.program.model,
            parameters=sum({id(e.tensor): e.tensor.numel() for e in self._parameters()}.values()),
            nodes=len(self.program.graph.nodes),
            stacks=stacks,
            loose=standing(None, False),
            unmatched=tuple(self._unmatched()),
            reasons=() if stacks else tuple(str(self.sites.explain(role)) for role in ("attention.q", "ffn.down")),
            reads=memory_reads(self.nearest, self.sites),
        )

    def _shown(self, site: Site) -> bool:
        """Tell whether a site is drawn as a component: not a sublayer or block, nor a bias that belongs to another
        site."""
        if site.role == "bias" and site.bias is not None:
            return site.bias.parameter not in self.owned
        return not is_structure(site.role)

    def _parameters(self) -> Iterable[TensorEntry]:
        return (entry for entry in self.program.table.values() if entry.kind == "parameter" and not entry.added)

    def _groups(self, numbered: Mapping[int, Sequence[Site]]) -> tuple[LayerGroup, ...]:
        blocks: dict[BlockOutline, list[tuple[int, BlockOutline]]] = {}
        for number, members in sorted(numbered.items()):
            block = self._block(members)
            blocks.setdefault(block, []).append((number, block))
        return tuple(
            LayerGroup(tuple(number for number, _ in alike), _merged([block for _, block in alike]))
            for alike in blocks.values()
        )

    def _block(self, members: Sequence[Site]) -> BlockOutline:
        """Return the block of one layer."""
        found = [_Slotted(site, self.order[site.op]) for site in members if site.role in ("attention", "ffn")]
        for site in members:
            if not self._shown(site):
                continue
            owner, slot = self._home(site, found)
            if owner is None:
                owner = _Slotted(None, self.order[site.op])
                found.append(owner)
            owner.members.append((site, slot))
        found.sort(key=lambda one: (one.order, min((self.order[s.op] for s, _ in one.members), default=0)))
        return BlockOutline(tuple(self._sublayer(one, members) for one in found))

    def _home(self, site: Site, found: Sequence[_Slotted]) -> tuple[_Slotted | None, Slot]:
        """Return the sublayer that a site belongs to, and the position of a norm in it."""
        if site.role == "norm":
            for one in found:
                slot = self._slot(site, one)
                if slot:
                    return one, slot
        role = "ffn" if site.role == "router" else site.role.split(".")[0]
        order = self.order[site.op]
        later = [one for one in found if one.order >= order]
        alike = [one for one in later if one.site and one.site.role == role and one.site.kind == site.kind]
        if alike:
            return next((one for one in alike if self._joined(site, one.site)), alike[0]), ""
        if site.role in ("norm", "bias", "side.down", "side.up") and later:
            return later[0], ""
        loose = found[-1] if found and found[-1].site is None else None
        return loose, ""

    def _joined(self, site: Site, sublayer: Site | None) -> bool:
        """Tell whether a site reads a sublayer's input or makes its result."""
        assert sublayer is not None
        read = {one.op for one in self.nearest.before(site.ports.get("input"))}
        starts = {one.op for one in self.nearest.before(sublayer.ports["input"])}
        return bool(read & starts) or site.op in {one.op for one in self.nearest.before(sublayer.ports.get("output"))}

    def _slot(self, norm: Site, one: _Slotted) -> Slot:
        """Return the position of a norm in a sublayer; "" if it does not belong to it."""

        def fed_by_norm(value: str | None) -> bool:
            return any(site.op == norm.op for site in self.nearest.before(value))

        if one.site is None:
            return "pre" if any(fed_by_norm(site.ports.get("input")) for site, _ in one.members) else ""
        ports = one.site.ports
        stream = {site.op for site in self.nearest.before(ports.get("residual"))}
        read = [ports["input"], *(s.ports["input"] for s in self._inside(one.site) if "input" in s.ports)]
        on_stream = norm.op not in stream and any(
            site.op in stream for site in self.nearest.before(norm.ports["input"])
        )
        if on_stream and any(map(fed_by_norm, read)):
            return "pre"
        if ports.get("normed") == norm.ports["output"]:
            return "post"
        if fed_by_norm(ports.get("output")):
            return "sandwich"
        for site in self._inside(one.site):
            if site.role == "attention.core":
                operands: tuple[Slot, ...] = ("q", "k", "v")
                for slot in operands:
                    if fed_by_norm(site.ports[slot]):
                        return slot
            elif fed_by_norm(site.ports.get("input")):
                return "latent" if site.role in QKV else "inner"
        return ""

    def _inside(self, sublayer: Site) -> list[Site]:
        roles = (
            ("attention.core", *QKV, "attention.latent", "attention.o")
            if sublayer.role == "attention"
            else ("ffn.hidden",)
        )
        same = (sublayer.layer, sublayer.stack, sublayer.kind)
        return [s for s in self.sites if s.role in roles and (s.layer, s.stack, s.kind) == same]

    def _sublayer(self, one: _Slotted, members: Sequence[Site]) -> Sublayer:
        site = one.site
        components = self._components(one.members)
        if site is None:
            return Sublayer(role="other", components=components)
        cores = [s for s in members if s.role == "attention.core" and site.role == "attention" and s.kind == site.kind]
        return Sublayer(
            role=site.role,
            kind=site.kind or "",
            layout=site.layout or "",
            parallel=site.parallel,
            mask=next((self.masks[core.id] for core in cores if core.id in self.masks), ""),
            components=components,
            ids=(site.id,),
        )

    def _components(self, slotted: Iterable[tuple[Site, Slot]]) -> tuple[Component, ...]:
        """Return the sites as components, in order; numbered experts of one shape are merged."""
        found: dict[Component, list[str]] = {}
        experts: Counter[Component] = Counter()
        values: Counter[Component] = Counter()
        for site, slot in slotted:
            component = self._component(site, slot)
            key = replace(component, values=0)
            if key in found and site.expert is None:
                key = replace(key, note=f"{key.note} {len(found)}".strip())
            found.setdefault(key, []).append(site.id)
            experts[key] += site.expert is not None
            values[key] += component.values
        return tuple(
            replace(
                component, ids=tuple(ids), experts=experts[component] or component.experts, values=values[component]
            )
            for component, ids in found.items()
        )

    def _component(self, site: Site, slot: Slot) -> Component:
        weight = site.weight
        shape, count = site.shape, 0
        if site.role == "norm":
            shape = None if site.scale is None else tuple(self.tensors[site.scale].shape)
        if shape is not None:
            count = math.prod(shape) * ((weight.experts if weight else None) or 1)
        if site.bias is not None and site.role != "bias":
            stored = self.tensors[site.bias.parameter].numel()
            count += stored if site.bias.window is None else len(site.bias.window)
        sharing = self.holders.get(weight.parameter, []) if weight else []
        return Component(
            role=site.role,
            cross=site.kind == "cross",
            path=starred(site),
            shape=shape,
            heads=site.heads,
            head_dim=site.head_dim,
            columns="" if site.columns is None else str(site.columns),
            fused=tuple(dict.fromkeys(s.role for s in sharing if s.op == site.op and s.role != site.role)),
            experts=weight.experts if weight else None,
            bias=site.bias is not None and site.role != "bias",
            slot=slot,
            stored="in x out" if weight and weight.transposed and site.role != "embedding" else "",
            tied=self._tied(site),
            note=site.note,
            values=count,
        )

    def _tied(self, site: Site) -> tuple[str, ...]:
        """Return the other users of a site's tensor: other roles, or the same role in other layers."""
        if site.weight is None:
            return ()
        names = self.program.table.tied(site.weight.parameter)
        others = [s for name in names for s in self.holders.get(name, []) if s.op != site.op]
        same = [s for s in others if s.role == site.role]
        roles = list(dict.fromkeys(s.role for s in others if s.role != site.role))
        if same:
            roles.append("other layers" if site.layer is not None else f"the other {site.role}")
        return tuple(roles)

    def _unmatched(self) -> Iterable[UnmatchedProjection]:
        for one in self.sites.unmatched:
            closest = f"closest to {one.closest}: " if one.closest else ""
            yield UnmatchedProjection(one.site.id, one.site.path, closest + one.reason)


def starred(site: Site) -> str:
    """Return the path with a star in place of its layer's number, so that equal layers have equal paths."""
    words = site.path.split(".")
    if site.layer is not None:
        number = next((i for i, word in enumerate(words) if word == str(site.layer)), None)
        number = next((i for i, word in enumerate(words) if word.isdigit()), None) if number is None else number
        if number is not None:
            words[number] = "*"
    if site.expert is not None:
        last = next((i for i in reversed(range(len(words))) if words[i] == str(site.expert)), None)
        if last is not None:
            words[last] = "*"
    return ".".join(words)


def _merged(blocks: Sequence[BlockOutline]) -> BlockOutline:
    """Return one block with the sites of all; they are equal except for their ids."""
    together = zip(*(block.sublayers for block in blocks), strict=True)
    return BlockOutline(
        tuple(
            replace(
                alike[0],
                ids=tuple(id for one in alike for id in one.ids),
                components=tuple(
                    replace(same[0], ids=tuple(id for one in same for id in one.ids))
                    for same in zip(*(one.components for one in alike), strict=True)
                ),
            )
            for alike in together
        )
    )
