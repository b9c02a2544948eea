"""What a model is made of, with layers that look alike told once: the data behind the table and the drawing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from peftgraph.sites.explanations.listing import ranges

Slot = Literal["", "pre", "post", "sandwich", "latent", "inner", "q", "k", "v"]


@dataclass(frozen=True, kw_only=True)
class Component:
    """Sites of one layer that look alike: a projection, a norm, an embedding.

    Attributes:
        role: the role of its sites.
        cross: it serves cross-attention.
        path: the owner of its weight; the number of the layer is shown as `*`.
        shape: (out, in) of a projection, (features,) of a norm.
        heads: heads that a projection of attention serves; `head_dim` is the width of each.
        columns: output features it owns in a weight that it shares with the roles in `fused`.
        experts: how many experts have one, each with a weight of `shape`.
        slot: where a norm stands in its sublayer.
        stored: the axis order of the stored weight, where it is not (out, in).
        tied: paths of other sites that use the same tensor.
        values: parameters it holds, biases and all experts included.
        ids: the sites, of all layers that the part stands for.
    """

    role: str
    cross: bool = False
    path: str = ""
    shape: tuple[int, ...] | None = None
    heads: int | None = None
    head_dim: int | None = None
    columns: str = ""
    fused: tuple[str, ...] = ()
    experts: int | None = None
    bias: bool = False
    slot: Slot = ""
    stored: str = ""
    tied: tuple[str, ...] = ()
    note: str = ""
    values: int = 0
    ids: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """What it is found by on a page: its role and its path, the same in all layers that it stands for."""
        return f"{self.role} {self.path}".strip()


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """What stands between two points of the residual stream.

    Attributes:
        role: "attention", "ffn", or "other" for projections that play no role.
        kind: "self" or "cross", for attention.
        layout: where its norm stands.
        parallel: it starts from the same value as another sublayer of its block.
        mask: which of the model's attention masks it uses, where there are several; "" otherwise.
        components: in graph order.
        ids: its sites, of all layers that it stands for.
    """

    role: str
    kind: str = ""
    layout: str = ""
    parallel: bool = False
    mask: str = ""
    components: tuple[Component, ...] = ()
    ids: tuple[str, ...] = field(default=(), compare=False)

    def of(self, *roles: str) -> tuple[Component, ...]:
        """Return the components with some roles."""
        return tuple(part for part in self.components if part.role in roles)

    def norm(self, *slots: Slot) -> tuple[Component, ...]:
        """Return the norms at some positions."""
        return tuple(part for part in self.components if part.role == "norm" and part.slot in slots)


@dataclass(frozen=True)
class BlockOutline:
    """The sublayers of a layer, in the order of the residual stream."""

    sublayers: tuple[Sublayer, ...]

    @property
    def components(self) -> tuple[Component, ...]:
        """All parts, in order."""
        return tuple(part for one in self.sublayers for part in one.components)


@dataclass(frozen=True)
class LayerGroup:
    """The layers of a stack that have the same block."""

    layers: tuple[int, ...]
    block: BlockOutline

    @property
    def title(self) -> str:
        """Such as "layers 0-79" or "layers 0, 2, ... 78"."""
        return f"layer{'' if len(self.layers) == 1 else 's'} {ranges(self.layers)}"


@dataclass(frozen=True)
class StackOutline:
    """A stack of layers, with what comes before and after it on its stream."""

    name: str
    stem: tuple[Component, ...]
    groups: tuple[LayerGroup, ...]
    tail: tuple[Component, ...]

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(len(group.layers) for group in self.groups)

    def block(self, layer: int) -> BlockOutline | None:
        """Return the block of a layer; None where the stack has no such layer."""
        return next((group.block for group in self.groups if layer in group.layers), None)


@dataclass(frozen=True)
class UnmatchedProjection:
    """A projection that plays no known role, and the nearest reason."""

    id: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model.

    Attributes:
        model: its class.
        parameters: how many values its parameters hold, tied ones once.
        nodes: of its graph.
        stacks: its layers.
        loose: what belongs to no stack.
        unmatched: projections without a role.
        reasons: where no layers were found, why.
        reads: (reader, memory) for each stack that reads another one by cross-attention.
    """

    model: str
    parameters: int
    nodes: int
    stacks: tuple[StackOutline, ...]
    loose: tuple[Component, ...]
    unmatched: tuple[UnmatchedProjection, ...]
    reasons: tuple[str, ...]
    reads: tuple[tuple[str, str], ...] = ()

    @property
    def depth(self) -> int:
        """The number of layers, of all stacks."""
        return sum(stack.depth for stack in self.stacks)

    def sublayers(self) -> Iterable[Sublayer]:
        """Return the sublayers of every distinct block."""
        return (one for stack in self.stacks for group in stack.groups for one in group.block.sublayers)

    def facts(self) -> list[str]:
        """Return the facts for its headline: sizes, attention, layout."""
        facts = [f"{self.parameters:,} parameters"]
        for stack in self.stacks:
            facts.append(counted(stack.depth, f"{stack.name} layer".strip()))
        facts += sorted({_attention_fact(one) for one in self.sublayers() if one.role == "attention"})
        layouts = sorted({f"{one.layout}-norm" for one in self.sublayers() if one.layout})
        experts = sorted({part.experts for one in self.sublayers() for part in one.components if part.experts})
        facts += layouts + [f"{number} experts" for number in experts]
        if any(one.parallel for one in self.sublayers()):
            facts.append("parallel sublayers")
        return facts


def _attention_fact(one: Sublayer) -> str:
    heads = {part.role: part.heads for part in one.components if part.heads}
    text = f"{one.kind}-attention".strip("-")
    if "attention.q" not in heads:
        return text
    text += f", {counted(heads['attention.q'] or 0, 'head')}"
    fewer = heads.get("attention.k")
    return text if fewer in (None, heads["attention.q"]) else f"{text} over {fewer}"


def skeleton(block: BlockOutline) -> BlockOutline:
    """Return a block without sizes and names; blocks with equal skeletons are drawn once."""
    return BlockOutline(
        tuple(
            replace(
                one,
                components=tuple(
                    Component(
                        role=part.role,
                        slot=part.slot,
                        fused=part.fused,
                        experts=None if part.experts is None else 1,
                        heads=None if part.heads is None else 1,
                    )
                    for part in one.components
                    if part.role != "bias"
                ),
            )
            for one in block.sublayers
        )
    )


def counted(number: int, noun: str) -> str:
    """Such as "1 layer" or "2 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
