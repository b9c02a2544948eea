"""The rows of the table of layers, for a terminal and for a page: sections of parts, and what is noted of each."""

from __future__ import annotations

from dataclasses import dataclass

from peftgraph.draw.model_outline import Component, LayerGroup, Outline, StackOutline, Sublayer


@dataclass(frozen=True)
class Section:
    """Rows under one title.

    Attributes:
        title: such as "decoder layers 0-79".
        detail: what holds for all of it: attention, layout, size.
        components: its rows.
        times: how often it repeats.
    """

    title: str
    detail: str
    components: tuple[Component, ...]
    times: int = 1


def sections(outline: Outline) -> list[Section]:
    """Return the sections of a model, in the order of its data flow."""
    found: list[Section] = []
    for stack in outline.stacks:
        name = f"{stack.name}, " if stack.name else ""
        found.append(Section(f"{name}before the layers", "", stack.stem))
        found += [_layers(stack, group) for group in stack.groups]
        found.append(Section(f"{name}after the layers", "", stack.tail))
    found.append(Section("elsewhere", "", outline.loose))
    return [section for section in found if section.components]


def _layers(stack: StackOutline, group: LayerGroup) -> Section:
    values = sum(part.values for part in group.block.components)
    facts = [described(one) for one in group.block.sublayers]
    facts.append(f"{values:,} parameters each" if len(group.layers) > 1 else f"{values:,} parameters")
    title = f"{stack.name} {group.title}".strip()
    return Section(title, ", ".join(facts), group.block.components, len(group.layers))


def described(one: Sublayer) -> str:
    """Describe a sublayer in words: "self attention (pre-norm, window 4096)"."""
    name = {"ffn": "feed-forward", "other": "projections without a role"}.get(
        one.role, f"{one.kind}-{one.role}".strip("-")
    )
    facts = [f"{one.layout}-norm" if one.layout else "", one.mask, "parallel" if one.parallel else ""]
    experts = {part.experts for part in one.components if part.experts}
    facts += [f"{number} experts" for number in sorted(experts)]
    shown = ", ".join(fact for fact in facts if fact)
    return name + (f" ({shown})" if shown else "")


def notes(part: Component) -> list[str]:
    """Return further facts about a component."""
    places = {
        "pre": "pre-norm",
        "post": "post-norm",
        "sandwich": "on the branch",
        "latent": "on the latent",
        "inner": "inside",
    }
    found = ["cross" if part.cross else "", places.get(part.slot, f"on {part.slot}" if part.slot else "")]
    if part.experts:
        found.append(f"{part.experts} experts")
    if part.columns:
        found.append(f"columns {part.columns}")
    if part.fused:
        found.append("fused with " + ", ".join(role.rpartition(".")[2] for role in part.fused))
    found += ["bias" if part.bias else "", "stored in × out" if part.stored else ""]
    if part.tied:
        found.append("tied to " + ", ".join(part.tied))
    return [note for note in [*found, part.note] if note]
