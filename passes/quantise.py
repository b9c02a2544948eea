"""Quantised weights (QLoRA: Dettmers et al., 2023): the frozen weights of a base are stored as codes of 4 or 8 bits.

    y = x W^T + b   ->   y = x D^T + b,    D = table[codes] * absmax, a constant for each block of values
    no fold: the codes stand for D, and not for W

D is computed anew wherever it is multiplied by, forward and backward, and is not kept between. The product is computed
in `compute`, to which D is rounded there; whoever else reads D has it in the dtype that W was stored in. A
model that comes with these codes keeps them, and its own dtype of products; other codes are refused. With
double=true the constants are stored as 8-bit codes with a constant of their own for every 256, and their mean. int8 has
one constant for each row: the largest magnitude, over 127; inputs are not quantised. Adapters that are put on
afterwards see D where they read the weight. Norms, biases and other weights stay as they are, and nothing here trains.
Codes and constants are bitsandbytes', and so are the values, to the bit. A Conv1D is quantised in the orientation of a
Linear. pg.fold refuses; quantised="dequantise" folds adapters into D, and quantised="requantise" quantises the result.
Shapes: O out, I in; E experts as axis 0. codes (O I / 2, 1) of bytes, absmax (O I / block,); int8: (O, I) and (O,).
Source: arXiv 2305.14314, sections 3.1 and 3.2; bitsandbytes 0.50, functional.quantize_4bit, int8_vectorwise_quant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Nesting, Pass, Replace, Rule
from peftgraph.authoring.quantised import BLOCKS, FORMATS, QuantisedWeight, Quantiser, describe_codes

aten = torch.ops.aten

PROJECTIONS = pg.parse_selector("attention.*|ffn.*")
STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NO_FOLD = "the codes stand for its weight rounded, and are no weight of the base"


@dataclass(frozen=True, kw_only=True)
class Quantise(Pass):
    """Storage of frozen weights in 4 or 8 bits.

    Attributes:
        at: projections; by default all of attentions and feed-forwards. Of a fused weight all parts, or none.
        format: "nf4", "fp4" or "int8".
        block: values that share a constant: 32, 64, ... 4096; int8 does not use it.
        double: whether the constants are quantised too; int8 does not use it.
        compute: the dtype of the product: "bfloat16", "float16", "float32", or "stored", that of the weights.
    """

    word = "quantise"
    at: pg.Selector = PROJECTIONS
    format: Literal["nf4", "fp4", "int8"] = "nf4"
    block: int = 64
    double: bool = True
    compute: Literal["bfloat16", "float16", "float32", "stored"] = "bfloat16"

    def check(self) -> None:
        """Refuse unknown words and blocks."""
        self.require_one_of("format", FORMATS)
        self.require_one_of("compute", (*DTYPES, "stored"))
        self.require(self.block in BLOCKS, f"block must be one of {', '.join(map(str, BLOCKS))}, got {self.block}.")

    @property
    def quantiser(self) -> Quantiser:
        """How matrices are quantised."""
        return Quantiser(self.format, self.block, self.double)

    def rules(self) -> list[Rule]:
        """One rule: dequantised weights in the place of the stored ones."""
        join = Replace(port="weight", exclusive=False)
        return [
            Rule(
                at=self.at,
                delta=self.delta,
                join=join,
                fold=NO_FOLD,
                where=self.leads,
                where_message="has a weight",
                satisfied=self.is_stored,
                nesting=Nesting.INNERMOST,
            )
        ]

    def leads(self, m: Match) -> bool:
        """Whether a site is the first one that reads its stored tensor, which is quantised once."""
        return m.site.weight is not None and next(one for one in self.sharing(m)).site == m.site

    def is_stored(self, m: Match) -> bool:
        """Whether the model came with these codes in the place of the weight; other codes are refused.

        Raises:
            Conflict: they are of another format.
        """
        weight = m.site.weight
        how = None if weight is None else m.table[weight.parameter].quantised
        if weight is None or how is None or any(weight.parameter in edit.quantised for edit in m.edits):
            return False
        ours, theirs = describe_codes(self.quantiser), describe_codes(how)
        if ours != theirs:
            raise pg.Conflict(
                f"{self} stores weights as {ours}, and in the model {weight.parameter} (at {m.site.id}) is stored as "
                f"{theirs} already. Load the model in that format, or without codes."
            )
        return True

    def sharing(self, m: Match) -> list[Match]:
        """Return the chosen sites that read the same stored tensor; those that do not look it up first."""
        found = [one for one in m.related(self.at) if m.shares_weight(one)]
        return sorted(found, key=lambda one: one.site.role == "embedding")

    def delta(self, m: Match, op: Builder) -> Mapping[str, fx.Node]:
        """D in the stored layout, for each name that the tensor is read under."""
        how, nodes = self.codes(m, op)
        parameter = self.stored(m)
        entries = {name: m.table[name] for name in m.table.tied(parameter)}
        value = op.dequantise(entries, how, nodes)
        self.narrow(m, op)
        first, *others = m.ports_of_weight()
        return {first: value, **{port: op.call(aten.alias.default, value) for port in others}}

    def stored(self, m: Match) -> str:
        """Return the name of the tensor; what cannot be stored as codes is refused."""
        self.fits(m)
        weight = m.site.weight
        assert weight is not None
        return weight.parameter

    def codes(self, m: Match, op: Builder) -> tuple[QuantisedWeight, dict[str, fx.Node]]:
        """Return the codes and constants of the whole stored tensor, and how it is computed from them."""
        parameter, weight = self.stored(m), m.site.weight
        assert weight is not None
        transposed = weight.transposed and m.site.role != "embedding"
        full = m.table[parameter].tensor
        made = self.quantiser.quantise(full.transpose(-2, -1) if transposed else full, full.dtype, parameter)
        names = {short: f"{parameter}_{short}" for short in made.own}
        nodes = {names[short]: op.stored_codes(names[short], value) for short, value in made.own.items()}
        for short, value in made.shared.items():
            names[short] = f"quantise.{self.format}_{short}"
            known = m.table.get(names[short])  # made by another pass of this kind
            nodes[names[short]] = (
                op.stored_codes(names[short], value, shared=True)
                if known is None
                else op.stored_tensor(names[short], known.tensor)
            )
        arguments = tuple(names[one] if isinstance(one, str) else one for one in made.order)
        own = {short: names[short] for short in made.own}

        def remake(matrix: Tensor) -> dict[str, Tensor]:
            again = self.quantiser.quantise(matrix.to(full.dtype), full.dtype, parameter)
            return {own[short]: value for short, value in again.own.items()}

        return QuantisedWeight(made.dequantise, arguments, transposed, str(self), remake), nodes

    def narrow(self, m: Match, op: Builder) -> None:
        """Let the products by the weight be computed in the dtype that was asked for."""
        dtype = DTYPES.get(self.compute)
        if dtype not in (None, op.dtype):
            for one in self.sharing(m):
                if one.site.role != "embedding":
                    op.compute_in(m.names[one.site.op], dtype)

    def fits(self, m: Match) -> None:
        """Refuse what is no stored matrix, trains, is quantised already, or is read by others too."""
        weight = m.site.weight
        assert weight is not None
        entry = m.table[weight.parameter]
        plain = (
            weight.computed is None
            and weight.axes is None
            and entry.tensor.dtype in STORED
            and entry.tensor.dim() == (2 if weight.experts is None else 3)
        )
        self.require(plain, f"the weight of {m.site.id} is no matrix that is stored as such. Leave that site out.")
        if entry.quantised is not None:
            raise pg.Conflict(
                f"{self} and {entry.quantised.made_by} both store {weight.parameter} (at {m.site.id}) as codes. "
                "Apply one of them."
            )
        if entry.trainable:
            tied = m.table.tied(weight.parameter)
            trainer = next(m.history[edit.application].method for edit in m.edits if {*tied} & {*edit.parameters})
            raise pg.Conflict(
                f"{self} would store {weight.parameter} as codes, which trains (at {m.site.id}) by {trainer}. "
                "Leave one of both out."
            )
        self.is_whole(m)
        self.comes_first(m)

    def is_whole(self, m: Match) -> None:
        """Refuse a tensor of which other sites are a part, or that they read too, unless they are chosen."""
        chosen = self.sharing(m)
        for other in (replaced for site in m.sites if site.role != "ffn.hidden" for replaced in [m.at_site(site)]):
            if not m.shares_weight(other) or any(_overlap(one, other) for one in chosen):
                continue
            raise pg.Conflict(
                f"{self} at {m.site.id} stores all of {other.site.weight and other.site.weight.parameter} as codes, "
                f"which {other.site.id} reads too. Choose that as well, or leave both out."
            )

    def comes_first(self, m: Match) -> None:
        """Refuse to come behind a pass that has read the weight."""
        weight = m.site.weight
        assert weight is not None
        names = m.table.tied(weight.parameter)
        makers = {name: edit for edit in m.edits for name in edit.nodes}
        for node in m.graph.nodes:
            if node.op == "get_attr" and node.target in names and node.name in makers:
                other = m.history[makers[node.name].application].method
                raise pg.Conflict(
                    f"{other} reads {weight.parameter} (at {m.site.id}), which {self} would change. Apply that first."
                )


def _overlap(one: Match, other: Match) -> bool:
    """Whether two sites of one stored tensor have values of it in common, at one operator."""
    if one.site.op != other.site.op:
        return False
    mine, theirs = one.site.columns, other.site.columns
    return mine is None or theirs is None or not set(mine).isdisjoint(theirs)
