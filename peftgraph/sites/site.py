"""Sites: the recognised parts of a model, with their weights and ports. Only data."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import fx

Layout = Literal["pre", "post", "sandwich"]

# Where a change of a site's weight enters: beside what the site gives, or into the weight that its operator reads.
Form = Literal["output", "weight"]


@dataclass(frozen=True)
class Columns:
    """An ordered list of half-open feature ranges, in the order in which the heads use them."""

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def from_indices(cls, indices: torch.Tensor | Sequence[int]) -> Columns:
        """Return the ranges of feature numbers, (F,) integers."""
        import torch

        index = torch.as_tensor(indices, dtype=torch.long)
        if len(index) == 0:
            return cls(())
        breaks = (index[1:] != index[:-1] + 1).nonzero().flatten()
        starts = index[torch.cat([torch.zeros(1, dtype=torch.long), breaks + 1])].tolist()
        stops = (index[torch.cat([breaks, torch.tensor([len(index) - 1])])] + 1).tolist()
        return cls(tuple(zip(starts, stops, strict=True)))

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Columns:
        """Return the ranges of plain feature numbers; no tensor is looked at."""
        runs: list[tuple[int, int]] = []
        for number in numbers:
            if runs and runs[-1][1] == number:
                runs[-1] = runs[-1][0], number + 1
            else:
                runs.append((number, number + 1))
        return cls(tuple(runs))

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.runs:
            yield from range(start, stop)

    def index(self) -> torch.Tensor:
        """Return the feature numbers as a LongTensor."""
        import torch

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
class MatrixAxes:
    """How a stored tensor of any rank is a matrix (out, in), or a stack of them.

    Attributes:
        sizes: the shape that the stored tensor is viewed in; its own, unless an axis is split into groups.
        stacked: the axes of `sizes` that count matrices (experts).
        outer: the axes that are output features, the slowest first.
        inner: the axes that are input features, the slowest first.
    """

    sizes: tuple[int, ...]
    stacked: tuple[int, ...]
    outer: tuple[int, ...]
    inner: tuple[int, ...]

    @classmethod
    def plain(cls, sizes: Sequence[int], transposed: bool, experts: int | None) -> MatrixAxes:
        """Return the axes of a matrix stored (out, in), or (in, out) if transposed, after an axis of experts if there
        is one; further axes are further input features, or output features of a transposed one."""
        first = 0 if experts is None else 1
        rest = tuple(range(first + 1, len(sizes)))
        outer, inner = (rest, (first,)) if transposed else ((first,), rest)
        return cls(tuple(sizes), tuple(range(first)), outer, inner)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        return math.prod(self.sizes[a] for a in self.outer), math.prod(self.sizes[a] for a in self.inner)

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, as a matrix has them: stacked, outer, inner."""
        return (*self.stacked, *self.outer, *self.inner)


@dataclass(frozen=True)
class Weight:
    """The stored location of a weight.

    Attributes:
        parameter: the stored parameter's dotted name.
        transposed: stored (in, out), like GPT-2's Conv1D.
        window: which of the stored parameter's output features the site owns (None = all).
        experts: the size of a leading expert dimension.
        axes: which axes are features, if the rank or their order is not that of a plain matrix.
        computed: the node that computes the weight from `parameter` and others, behind a parametrisation such as
            weight_norm; None where the parameter is the weight.
    """

    parameter: str
    transposed: bool = False
    window: Columns | None = None
    experts: int | None = None
    axes: MatrixAxes | None = None
    computed: str | None = None

    def shape(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Return (out, in) of the site's own part, for one expert."""
        sizes = [int(size) for size in tensors[self.parameter].shape]
        axes = self.axes or MatrixAxes.plain(sizes, self.transposed, self.experts)
        out, inner = axes.shape
        return (out if self.window is None else len(self.window)), inner


@dataclass(frozen=True)
class Equation:
    """A product in index letters: x contracted with a weight over `inner`; the result has `outer` of the weight.

    Attributes:
        x: the letters of the operand that is no weight.
        stacked: the letters that count matrices of a stack, which x and the result have too.
        outer: the weight's output features, in the order in which its matrix has them.
        inner: the weight's input features, in that order.
        result: the letters of the product.
        sizes: the sizes of the weight's letters.
    """

    x: str
    stacked: str
    outer: str
    inner: str
    result: str
    sizes: tuple[tuple[str, int], ...]

    def narrowing(self) -> Lettered:
        """Return the product of x and a matrix (R, in), or a stack of them, with R features in place of the product's
        own."""
        first, *others = (letter for letter in self.result if letter in self.outer)
        narrow = "".join(self.rank if one == first else one for one in self.result if one not in others)
        weight = self.stacked + self.rank + self.inner
        return Lettered(f"{self.x},{weight}->{narrow}", self._sizes(weight))

    def widening(self) -> Lettered:
        """Return what `narrowing` gives by a matrix (out, R), or a stack of them, to the features of the product."""
        narrow = self.narrowing().equation.partition("->")[2]
        weight = self.stacked + self.outer + self.rank
        return Lettered(f"{narrow},{weight}->{self.result}", self._sizes(weight))

    @property
    def rank(self) -> str:
        """A letter that is free."""
        used = self.x + self.result + self.inner
        return next(letter for letter in string.ascii_letters if letter not in used)

    def _sizes(self, letters: str) -> list[int]:
        """Return the sizes of letters, -1 for the one that is no letter of the weight's."""
        known = dict(self.sizes)
        return [known.get(letter, -1) for letter in letters]

    def lengths(self, letters: str) -> list[int]:
        """Return the sizes of some of the weight's letters."""
        known = dict(self.sizes)
        return [known[letter] for letter in letters]


@dataclass(frozen=True)
class Lettered:
    """A product with a matrix, as an einsum.

    Attributes:
        equation: of x and the matrix.
        sizes: the shape in which the matrix is read; -1 for the number of narrow features.
    """

    equation: str
    sizes: list[int]


@dataclass(frozen=True)
class Bias:
    """The bias vector of a site; `window` as in Weight."""

    parameter: str
    window: Columns | None = None


@dataclass(frozen=True)
class Axes:
    """The axes of a value of an attention, a word for each: b batch, or whatever else heads share; h heads; t
    positions; d features; 1 a single entry. "(b h)" and "(h b)" are two on one axis, as einops writes them, and in
    "(h r)" each head stands r times in a row. `heads`: how many heads differ."""

    words: tuple[str, ...]
    heads: int

    @property
    def positions(self) -> int:
        """The axis of the positions."""
        return self.words.index("t")

    def __str__(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One recognised part of a model. `ports` name nodes of the graph it was found in."""

    role: str
    path: str
    op: str
    layer: int | None = None
    depth: int | None = None  # how many layers its stack has
    stack: str | None = None
    kind: str | None = None
    columns: Columns | None = None
    expert: int | None = None
    weight: Weight | None = None
    bias: Bias | None = None
    scale: str | None = None  # the multiplicative parameter of a norm
    port_items: tuple[tuple[str, str], ...] = ()
    reader_items: tuple[tuple[str, str], ...] = ()  # of ports that another node than `op` reads for the site
    heads: int | None = None
    head_dim: int | None = None
    layout: Layout | None = None
    parallel: bool = False
    feature_axis: int = -1
    equation: Equation | None = None  # how the product is written, where features are on other axes than the last
    form: Form = "output"
    reads: tuple[str, ...] = ()  # the stored weights of a part that has several
    note: str = ""
    tags: tuple[str, ...] = ()  # the alternatives that a pattern's match took
    values: tuple[tuple[str, str], ...] = ()  # the names in a pattern's match, and the nodes they stand for
    serial: int | None = None
    axis_items: tuple[tuple[str, Axes], ...] = ()  # of q, k, v and the output of an attention core
    shape: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Port -> the meaning of its axes."""
        return MappingProxyType(dict(self.axis_items))

    @property
    def ports(self) -> Mapping[str, str]:
        """Port -> node name."""
        return MappingProxyType(dict(self.port_items))

    @property
    def readers(self) -> Mapping[str, str]:
        """Port -> the node that reads its value for the site, where that is not `op`."""
        return MappingProxyType(dict(self.reader_items))

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


@dataclass(frozen=True, kw_only=True)
class NearMiss:
    """The record of a failed search for a role: how far it got, and why it stopped.

    Attributes:
        role: the role that was searched for.
        node: where it stopped, by graph name.
        expected: the condition that failed there.
        found: what is there instead; a node in it is written %name, with its graph name.
        passed: how many conditions held, of `total`.
        near: further relevant nodes, by graph name.
    """

    role: str
    node: str
    expected: str
    found: str
    passed: int
    total: int
    near: tuple[str, ...] = ()

    @classmethod
    def at(
        cls, role: str, node: fx.Node, conditions: Sequence[str], passed: int, found: str, *near: fx.Node
    ) -> NearMiss:
        """Return the first `passed` conditions held, the next failed."""
        names = tuple(dict.fromkeys(one.name for one in near))
        return cls(
            role=role,
            node=node.name,
            expected=conditions[passed],
            found=found,
            passed=passed,
            total=len(conditions),
            near=names,
        )

    @property
    def reason(self) -> str:
        """In one sentence."""
        return f"expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Absent:
    """A site that is missing where others of its kind have one: the sublayer of an attention without a residual add, or
    the queries of an attention without a projection for them. `site` describes what it would be, and has no ports."""

    site: Site
    reason: str

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}"
