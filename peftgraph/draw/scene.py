"""A block of a base as lines, and what passes inserted at the stations of those lines where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from peftgraph.draw.algebra import Letters
from peftgraph.draw.columns import FLAT, NARROW
from peftgraph.draw.inserted import insertions
from peftgraph.draw.items import NARROWEST, BendItem, BoxItem, BranchItem, GapItem, RowItem
from peftgraph.draw.lines import Line
from peftgraph.draw.parts import Block, Part, Stack, Sublayer
from peftgraph.draw.placement import Placement
from peftgraph.ir.edits import Edit
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Site, Sites
from peftgraph.sites.roles import with_slot

QKV = with_slot(("input",))


@dataclass
class Scene:
    """One block of one stack.

    Attributes:
        title: which it is.
        stream: its residual stream.
    """

    title: str
    stream: Line


class Builder:
    """Builds the lines of one layer.

    Args:
        program: a rewritten program.
        sites: of its base.
        letters: for shapes.
        kinds: application -> CSS class, of the passes that are shown.
    """

    def __init__(self, program: ProgramData, sites: Sites, letters: Letters, kinds: Mapping[int, str]) -> None:
        self.program, self.sites, self.letters, self.kinds = program, sites, letters, kinds
        base = program.base or program
        self.nodes = {node.name: node for node in base.graph.nodes}
        self.order = {name: place for place, name in enumerate(self.nodes)}
        self.by_id = {site.id: site for site in sites}

    def changed(self) -> dict[str, list[int]]:
        """For every stack that the shown passes changed, the numbers of its changed layers."""
        found: dict[str, list[int]] = {}
        for edit in self.program.edits:
            site = self.by_id[edit.site]
            if edit.application in self.kinds and site.layer is not None:
                found.setdefault(site.stack or "", []).append(site.layer)
        return found

    def scene(self, stack: Stack, layer: int) -> Scene | None:
        """The block, with everything that the shown passes did to it; None where a stack has no such layer."""
        block = next((group.block for group in stack.groups if layer in group.layers), None)
        if block is None:
            return None
        edits = [edit for edit in self.program.edits if self._concerns(edit, stack, layer)]
        touched = {edit.site for edit in edits} | self._trained(edits)
        plan = _Plan(self, stack.name, layer)
        stem = [part for part in stack.stem if touched & set(part.ids)]
        tail = [part for part in stack.tail if touched & set(part.ids)]
        plan.ends(stem)
        if stem and layer:
            plan.stream.add(GapItem(f"{layer} block{'s' if layer > 1 else ''}"), plan.enters(layer))
        elif stem:
            plan.also[plan.enters(layer)] = (plan.stream, len(stem))
        else:
            plan.stream.values[0] = plan.enters(layer)
        plan.block(block)
        left = stack.depth - 1 - layer
        if tail and left > 0:
            plan.stream.add(GapItem(f"{left} block{'s' if left > 1 else ''}"), "")
        plan.ends(tail)
        plan.mark(edits)
        placement = Placement(self.program, layer, plan.stream, plan.homes, plan.also, plan.cores)
        placement.insert(insertions(self.program, self.sites, edits))
        return Scene(f"{stack.name} layer {layer} of 0–{stack.depth - 1}".strip(), plan.stream)

    def _concerns(self, edit: Edit, stack: Stack, layer: int) -> bool:
        site = self.by_id[edit.site]
        if edit.application not in self.kinds:
            return False
        if site.layer is None:
            ids = {id for part in (*stack.stem, *stack.tail) for id in part.ids}
            return site.id in ids or bool(self._trained([edit]) & ids)
        return site.layer == layer and (site.stack or "") == stack.name

    def _trained(self, edits: Iterable[Edit]) -> set[str]:
        """The sites whose own parameters some edits train."""
        names = {name for edit in edits if not edit.moves for name in edit.parameters}
        return {site.id for site in self.sites if names & set(own(site)) and site.layer is None}


def own(site: Site) -> dict[str, str]:
    """The stored parameters of a site, and how they are called in a formula."""
    weight, bias = site.weight and site.weight.parameter, site.bias and site.bias.parameter
    return {name: letter for name, letter in ((weight, "W"), (site.scale, "g"), (bias, "b")) if name}


@dataclass
class _Plan:
    """One block while its lines are built."""

    builder: Builder
    stack: str
    layer: int
    stream: Line = field(default_factory=lambda: Line(kind="stream"))
    boxes: list[tuple[BoxItem, Site]] = field(default_factory=list)
    homes: dict[str, tuple[Line, int]] = field(default_factory=dict)
    also: dict[str, tuple[Line, int]] = field(default_factory=dict)
    cores: dict[str, tuple[Line, int]] = field(default_factory=dict)

    # the base

    def enters(self, layer: int) -> str:
        """The value that enters a block."""
        for site in self.builder.sites:
            if site.role == "block" and site.layer == layer and (site.stack or "") == self.stack:
                return site.ports["input"]
        return ""

    def ends(self, parts: Sequence[Part]) -> None:
        """What stands before or after the blocks."""
        for part in parts:
            site = self.builder.by_id[part.ids[0]]
            value = site.ports.get("output", site.op)
            self._box(self.stream, site, part.role, NARROW if part.role == "norm" else FLAT, value)

    def _box(self, line: Line, site: Site, label: str, height: float = FLAT, value: str = "", width: float = 0) -> None:
        wide = height > NARROW or site.role == "norm"
        detail = self.builder.letters.shape(site.shape) if site.shape and height > NARROW and wide else ""
        kind = "base norm" if site.role == "norm" else "base"
        text = max(150.0, 7 * len(label) + 6 * len(detail) + 30) if height > NARROW else 84.0
        tip = f"{site.role}  {site.path}"
        item = BoxItem(label, detail, tip, kind, width or text, height)
        line.add(item, value or site.ports["output"])
        self.boxes.append((item, site))
        self.homes[site.id] = (line, len(line.items))

    def block(self, block: Block) -> None:
        """Its sublayers, those side by side together."""
        steps: list[list[Sublayer]] = []
        for one in block.sublayers:
            beside = bool(steps) and one.parallel and steps[-1][-1].parallel
            steps[-1].append(one) if beside else steps.append([one])
        for step in steps:
            self._step(step)

    def _step(self, step: Sequence[Sublayer]) -> None:
        start = self.stream.values[-1]
        lines: list[Line] = []
        joined, normed = "", ""
        for one in step:
            site = self._site_of(one)
            line = Line(values=[start], parent=self.stream)
            parts = [(part, self._site(part)) for part in one.parts if part.role != "bias"]
            self._norms(line, parts, "pre")
            if one.role == "attention":
                self._attention(line, one, parts)
            elif one.role == "ffn":
                self._feedforward(line, parts)
            else:
                for part, other in parts:
                    if part.role != "norm":
                        self._box(line, other, part.path.rpartition(".")[2] or part.role)
            self._norms(line, parts, "sandwich")
            lines.append(line)
            if site is not None:
                joined, normed = site.ports["join"], site.ports.get("normed", normed)
                self.homes[site.id] = (line, len(line.items))
        self.stream.add(BranchItem(lines), joined)
        place = (self.stream, len(self.stream.items))
        self.also |= {site.ports["join"]: place for one in step if (site := self._site_of(one)) is not None}
        for one in step:
            self._norms(self.stream, [(part, self._site(part)) for part in one.parts], "post")

    def _site(self, part: Part) -> Site:
        """The site of a part in this layer."""
        by_id = self.builder.by_id
        return next(by_id[id] for id in part.ids if by_id[id].layer == self.layer)

    def _site_of(self, one: Sublayer) -> Site | None:
        return next((s for s in self._sites(one.role) if (s.kind or "") == one.kind), None)

    def _sites(self, role: str) -> Iterator[Site]:
        for site in self.builder.sites:
            if site.role == role and site.layer == self.layer and (site.stack or "") == self.stack:
                yield site

    def _norms(self, line: Line, parts: Sequence[tuple[Part, Site]], slot: str) -> None:
        for part, site in parts:
            if part.role == "norm" and part.slot == slot:
                self._box(line, site, "norm", NARROW)

    def _attention(self, line: Line, one: Sublayer, parts: Sequence[tuple[Part, Site]]) -> None:
        inner = [(part, site) for role in QKV for part, site in parts if part.role == role]
        for part, site in parts:
            if part.role == "attention.latent":
                self._box(line, site, "latent")
        tracks = [self._track(line, site, part.role[-1], parts) for part, site in inner]
        core = next((s for s in self._sites("attention.core") if (s.kind or "") == one.kind), None)
        heads = next((part.heads for part, _ in inner if part.heads), None)
        many = f"{heads} heads" if heads and heads > 1 else ""
        item = BoxItem(f"{one.kind}-attention".strip("-"), many, kind="base core", height=42.0)
        value = core.ports["output"] if core else ""
        if tracks:
            remote = tuple(i for i in (1, 2) if one.kind == "cross" and i < len(tracks))
            fused = len(inner) > 1 and all(part.fused for part, _ in inner)
            line.add(RowItem(tracks, "core", item, remote, fused), value)
        else:
            line.add(item, value)
        for track, (part, _) in zip(tracks, inner, strict=True):
            if core is not None:
                self.also[core.ports[part.role[-1]]] = (track, len(track.items))
        if core is not None:
            self.homes[core.id] = self.cores[core.id] = (line, len(line.items))
        self._norms(line, parts, "inner")
        for part, site in parts:
            if part.role == "attention.o":
                self._box(line, site, "o")

    def _track(self, parent: Line, site: Site, label: str, parts: Sequence[tuple[Part, Site]]) -> Line:
        line = Line(values=[site.ports["input"]], parent=parent)
        self._box(line, site, label, 38.0, width=NARROWEST)
        self._norms(line, parts, label)
        return line

    def _feedforward(self, line: Line, parts: Sequence[tuple[Part, Site]]) -> None:
        wide = [
            (part, site) for role in with_slot(("router", "gate", "wide")) for part, site in parts if part.role == role
        ]
        hidden = next(self._sites("ffn.hidden"), None)
        value = hidden.ports["output"] if hidden is not None else ""
        if len(wide) > 1:
            tracks: list[Line] = []
            for part, site in wide:
                tracks.append(Line(values=[site.ports["input"]], parent=line))
                experts = f"{part.experts} × " if part.experts else ""
                self._box(tracks[-1], site, experts + part.role.rpartition(".")[2], 38.0, width=96.0)
            line.add(RowItem(tracks, "times"), value)
        else:
            for part, site in wide:
                self._box(line, site, part.role.rpartition(".")[2])
            line.add(BendItem("ffn.hidden: the nonlinearity of up"), value)
        if hidden is not None:
            self.homes[hidden.id] = (line, len(line.items))
        self._norms(line, parts, "inner")
        for part, site in parts:
            if part.role == "ffn.down":
                self._box(line, site, f"{part.experts} × down" if part.experts else "down")

    # what passes did

    def mark(self, edits: Iterable[Edit]) -> None:
        """Marks the parts whose own parameters train."""
        for edit in edits:
            for item, site in self.boxes:
                for name, letter in own(site).items():
                    mark = (self.builder.kinds[edit.application], letter)
                    if not edit.moves and name in edit.parameters and mark not in item.marks:
                        item.marks.append(mark)
