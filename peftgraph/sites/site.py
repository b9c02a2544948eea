"""What a search returns: sites, the weights they own, and the sequence that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, overload

import torch

from peftgraph.errors import PeftGraphError

if TYPE_CHECKING:
    from .patterns import Pattern, PatternSearch

Layout = Literal["pre", "post", "sandwich"]


@dataclass(frozen=True)
class Columns:
    """An ordered list of half-open feature ranges, in the order in which the heads see them."""

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def from_indices(cls, indices: torch.Tensor | Sequence[int]) -> Columns:
        """The ranges of feature numbers, (F,) integers."""
        index = torch.as_tensor(indices, dtype=torch.long)
        if len(index) == 0:
            return cls(())
        breaks = (index[1:] != index[:-1] + 1).nonzero().flatten()
        starts = index[torch.cat([torch.zeros(1, dtype=torch.long), breaks + 1])].tolist()
        stops = (index[torch.cat([breaks, torch.tensor([len(index) - 1])])] + 1).tolist()
        return cls(tuple(zip(starts, stops, strict=True)))

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.runs:
            yield from range(start, stop)

    def index(self) -> torch.Tensor:
        """The feature numbers as a LongTensor."""
        return torch.tensor(list(self), dtype=torch.long)

    @property
    def contiguous(self) -> bool:
        return len(self.runs) == 1

    @property
    def starts_at(self) -> int:
        return self.runs[0][0]

    def __str__(self) -> str:
        shown = ",".join(f"{start}:{stop}" for start, stop in self.runs[:3])
        return shown + (",..." if len(self.runs) > 3 else "")


@dataclass(frozen=True)
class Weight:
    """Where a weight lives.

    `transposed`: stored (in, out), like GPT-2's Conv1D. `window`: which of the stored parameter's output
    features the
    site owns (None = all). `experts`: the size of a leading expert dimension.
    """

    parameter: str
    transposed: bool = False
    window: Columns | None = None
    experts: int | None = None

    def shape(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """(out, in) of the site's own part, for one expert."""
        sizes = [int(size) for size in tensors[self.parameter].shape]
        if self.experts is not None:
            sizes = sizes[1:]
        first, rest = sizes[0], sizes[1:]
        count = 1
        for size in rest:
            count *= size
        out, inner = (count, first) if self.transposed else (first, count)
        return (out if self.window is None else len(self.window)), inner


@dataclass(frozen=True)
class Bias:
    """The bias vector of a site; `window` as in Weight."""

    parameter: str
    window: Columns | None = None


@dataclass(frozen=True, kw_only=True)
class Site:
    """One recognised part of a model. `ports` name nodes of the graph it was found in."""

    role: str
    path: str
    op: str
    layer: int | None = None
    stack: str | None = None
    kind: str | None = None
    columns: Columns | None = None
    expert: int | None = None
    weight: Weight | None = None
    bias: Bias | None = None
    scale: str | None = None  # the multiplicative parameter of a norm
    port_items: tuple[tuple[str, str], ...] = ()
    heads: int | None = None
    head_dim: int | None = None
    layout: Layout | None = None
    parallel: bool = False
    feature_axis: int = -1
    note: str = ""
    tags: tuple[str, ...] = ()  # the alternatives that a pattern's match took
    serial: int | None = None
    shape: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def ports(self) -> Mapping[str, str]:
        """Port -> node name."""
        return MappingProxyType(dict(self.port_items))

    @property
    def id(self) -> str:
        """A stable name, unique in its model: "encoder.0.attention.q", "0.ffn.up[expert 3]", "0.norm.1"."""
        layer = None if self.layer is None else str(self.layer)
        kind = "cross" if self.kind == "cross" else None
        text = ".".join(part for part in (self.stack, layer, kind, self.role) if part)
        if self.expert is not None:
            text += f"[expert {self.expert}]"
        return text if self.serial is None else f"{text}.{self.serial}"

    def __str__(self) -> str:
        return f"{self.id} at {self.path}" if self.path else self.id


@dataclass(frozen=True)
class NearMiss:
    """How far a search for a role got at a node, and why it stopped there."""

    role: str
    node: str
    reason: str
    progress: int = 0


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of one graph, in graph order. Immutable."""

    items: tuple[Site, ...]
    misses: tuple[NearMiss, ...] = ()
    unmatched: tuple[str, ...] = ()
    searched: tuple[PatternSearch, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Site, ...]: ...
    def __getitem__(self, index: int | slice) -> Site | tuple[Site, ...]:
        return self.items[index]

    @property
    def layers(self) -> int:
        """The number of layers (of the deepest stack)."""
        return 1 + max((site.layer for site in self.items if site.layer is not None), default=-1)

    def select(self, selector: object) -> tuple[Site, ...]:
        """The sites a selector (or its text) matches; possibly none."""
        from .select import as_selector

        chosen = as_selector(selector)
        for pattern in chosen.patterns():
            self.search_of(pattern)
        return tuple(site for site in self.items if chosen.matches(site))

    def search_of(self, pattern: Pattern) -> PatternSearch:
        """What became of a pattern on this graph.

        Raises:
            PeftGraphError: it was not searched for.
        """
        found = next((one for one in self.searched if one.pattern == pattern), None)
        if found is None:
            raise PeftGraphError(
                f"these sites were not searched for the pattern {pattern.name}. program.apply(...) does so by itself; "
                "program.with_patterns(...).sites are the sites to look at."
            )
        return found

    def require(self, selector: object) -> tuple[Site, ...]:
        """Like select, but no match, or a part of the selector that never matched, is an error that says
        why."""
        from .explain import require

        return require(self, selector)

    def explain(self, selector: object) -> str:
        """Why a selector finds what it finds: which part killed the match, and the nearest miss."""
        from .explain import explain

        return explain(self, selector)

    def __str__(self) -> str:
        rows = [("role", "path", "layer", "stack", "kind", "columns", "shape")]
        rows += [_row(site) for site in self.items]
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _row(site: Site) -> tuple[str, str, str, str, str, str, str]:
    role = site.role if site.expert is None else f"{site.role}[expert {site.expert}]"
    layer = "" if site.layer is None else str(site.layer)
    shape = "" if site.shape is None else " x ".join(map(str, site.shape))
    columns = "" if site.columns is None else str(site.columns)
    return role, site.path, layer, site.stack or "", site.kind or "", columns, shape
