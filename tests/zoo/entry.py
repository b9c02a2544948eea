"""What the zoo holds: models by name, each with an example call and with what is known to be inside it.

A truth is read from module paths and classes of the eager model, so it shares nothing with the engine, which never
looks at a name. It serves for scoring only. `None` always means "cannot be told": the score does not count it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Group = Literal[
    "decoder", "encoder", "encoder-decoder", "vision", "audio", "multimodal", "hand-written", "library", "package"
]


@dataclass(frozen=True)
class Part:
    """One role of a site.

    Attributes:
        role: "attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.gate" or "ffn.down".
        parameter: the full name of the weight that plays it (any of its names, where it is tied).
        columns: output features of that weight that are this role's own, when one weight serves several roles.
            None: the weight has this role only.
        optional: a contribution that need not be found, but is right when it is.
    """

    role: str
    parameter: str
    columns: frozenset[int] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Expected:
    """An attention or a feed-forward that a model has.

    Attributes:
        path: the module inside whose forward it is computed; several may share one.
        parts: its projections.
        layer: its index within its stack.
        kind: "self" or "cross", of an attention.
        layout: where the norms stand.
        uses: how often one forward of the model runs it (shared layers run more than once).
    """

    path: str
    parts: tuple[Part, ...]
    layer: int | None = None
    kind: Literal["self", "cross"] | None = None
    layout: Literal["pre", "post", "sandwich"] | None = None
    uses: int = 1


@dataclass(frozen=True)
class Truth:
    """What is inside a model. `None`: this side of the model cannot be told and is not counted.

    Attributes:
        attentions: every attention; an attention found inside none of their paths is a false one.
        feedforwards: every feed-forward.
    """

    attentions: tuple[Expected, ...] | None
    feedforwards: tuple[Expected, ...] | None


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: unique, shown in the report: a model type, or "timm/vit_tiny".
        group: the part of the report it is counted in.
        build: makes the model, tiny and random.
        example: the keyword inputs of one call, sizes coprime (batch 3, length 7).
        truth: what is inside the model that `build` made, given an example call of it.
    """

    name: str
    group: Group
    build: Callable[[], nn.Module]
    example: Callable[[nn.Module], Mapping[str, Any]]
    truth: Callable[[nn.Module, Mapping[str, Any]], Truth]
