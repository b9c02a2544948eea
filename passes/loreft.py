"""ReFT (Wu et al., 2024): a low-rank edit of the hidden state at its first and last positions.

    h   ->   h + R^T (W h + b - R h),  R R^T = I     LoReFT
    h   ->   h + R^T (W h + b - R h)                 NoReFT, with orthogonal=false
    h   ->   h + R^T (W h + b)                       DiReFT, with orthogonal=false subtract=false
    no fold: the edit applies at some positions only, and no single weight computes the hidden state

LoReFT replaces the component of h in the subspace of R's rows by W h + b. An unconstrained matrix X trains, and the
graph orthonormalises its rows in order: R R^T = I holds under every optimizer, orthonormal rows stay unchanged, and
the lengths of rows do not matter. `finalize()` replaces X by R (ONNX has no such operation). The graph computes R^T
((W - R) h + b), unless pyreft's `activation` is applied to W h + b. The first `prefix` and the last `suffix` tokens
are edited; padding is not counted, unless skip_padding=false. Where the two overlap, a position belongs to the
nearer end, and the middle one to the suffix. tied=false gives each end its own edit, which the authors' code and
counts call untied; in the paper's text every position has one. The authors edit the prompt alone. Here the suffix
ends with the last token of the input: use suffix=0 for a model that is trained on prompts with answers, or that
generates.
Shapes: B batch, S positions, D features of h, R rank; R, W and X (R, D), b (R,). X starts uniform and orthonormal, W
and b (and R where it is free) as torch.nn.Linear, as in the authors' code, so a fresh pass is not the identity; with
start="identity" it is: W = R (DiReFT: W = 0) and b = 0. Dropout is applied to the edited state, as in the authors'
code.
Source: arXiv 2404.03592, equations 2 and 3, section 4.1; stanfordnlp/pyreft, interventions.py, whose
NodireftIntervention is the paper's DiReFT, and whose DireftIntervention keeps R orthonormal (subtract=false alone).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import ACTIVATIONS, Builder, Match, Pass, Replace, Rule, omit_default
from peftgraph.authoring.modules import init, orthonormalise, orthonormalise_tensor
from peftgraph.authoring.sequence import first_and_last_masks, token_mask

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LoReFT(Pass):
    """An edit of the hidden state in a subspace of few dimensions, at few positions.

    Attributes:
        at: values of (batch, positions, features); the outputs of blocks by default.
        rank: of the edit, at most the number of features.
        prefix: how many of the first tokens are edited; none edits every position.
        suffix: how many of the last.
        tied: whether prefix and suffix share one edit.
        orthogonal: whether R has orthonormal rows.
        subtract: whether R h is subtracted.
        activation: on W h + b; a word of `peftgraph.authoring.ACTIVATIONS`, or none.
        dropout: on the edited hidden state, in training.
        start: "paper" or "identity".
        skip_padding: whether first and last are counted among the tokens, or among all positions.
    """

    word = "loreft"
    at: pg.Selector = pg.block
    rank: int = 8
    prefix: int | None = 7
    suffix: int = 7
    tied: bool = True
    orthogonal: bool = True
    subtract: bool = True
    activation: str | None = omit_default(None)
    dropout: float = 0.0
    start: Literal["paper", "identity"] = "paper"
    skip_padding: bool = True

    def check(self) -> None:
        """Refuse sizes out of range, ends that contradict one another, and identity initialisation with an
        activation."""
        self.require(self.rank >= 1, f"rank must be at least 1, got {self.rank}.")
        self.require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}.")
        for end in ("prefix", "suffix"):
            size = getattr(self, end)
            self.require(size is None or size >= 0, f"{end} must be at least 0, got {size}.")
        if self.prefix is None:
            self.require(self.suffix == 0, "prefix=none edits every position; give suffix=0 with it.")
        self.require(self.prefix != 0 or self.suffix != 0, "it edits no position; give prefix, suffix or both.")
        self.require(self.tied or bool(self.prefix and self.suffix), "tied=false needs both a prefix and a suffix.")
        self.require_one_of("start", ("paper", "identity"))
        if self.activation is not None:
            self.require_one_of("activation", ACTIVATIONS)
            self.require(self.start == "paper", 'an activation has no identity to start at; give start="paper".')

    def rules(self) -> list[Rule]:
        """Return one rule: replace h by the edited hidden state."""
        reason = "its edit applies at some positions only, and no single weight computes the hidden state"
        return [Rule(at=self.at, delta=self.delta, join=Replace(exclusive=False), fold=reason)]

    def finalized(self) -> Self:
        """Return the same pass with R itself as a parameter."""
        return replace(self, orthogonal=False)

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Return h, edited at the chosen positions."""
        h_BSD = m.output
        sequence = h_BSD.meta["val"].dim() == 3 and m.site.feature_axis == -1 and m.site.columns is None
        self.require(sequence, f"{m.site.id} is no (batch, positions, features); choose block, attention or ffn.")
        self.require(
            self.rank <= m.features, f"rank {self.rank} is more than the {m.features} features of {m.site.id}."
        )
        if self.prefix is None:
            return self.edited(op, h_BSD, "")
        ends_NBS1 = op.shared_value(f"{m.site.stack} ends", partial(self.ends, m, op))
        result_BSD = h_BSD
        for i, name in enumerate([""] if self.tied else ["prefix_", "suffix_"]):
            here_BS1 = op.call(aten.select.int, ends_NBS1, 0, i)
            result_BSD = op.call(aten.where.self, here_BS1, self.edited(op, h_BSD, name), result_BSD)
        return result_BSD

    def ends(self, m: Match, op: Builder) -> fx.Node:
        """Return where the edit applies, booleans (1, B, S, 1); untied (2, B, S, 1), for the prefix and the suffix."""
        if self.skip_padding:
            real_BS = token_mask(m, op)
        else:
            sizes = [op.call(aten.sym_size.int, m.output, axis) for axis in (0, 1)]
            real_BS = op.call(aten.ones.default, sizes, dtype=torch.bool, device=op.device)
        first_BS, last_BS = first_and_last_masks(op, real_BS, self.prefix or 0, self.suffix)
        edits = [op.call(aten.logical_or.default, first_BS, last_BS)] if self.tied else [first_BS, last_BS]
        return op.call(aten.unsqueeze.default, op.call(aten.stack.default, edits), -1)

    def edited(self, op: Builder, h_BSD: fx.Node, name: str) -> fx.Node:
        """Return drop(h + R^T (W h + b - R h)), with parameters of its own, named `{name}weight` and so on."""
        width = int(h_BSD.meta["val"].shape[-1])
        w_RD, r_RD = self.matrices(op, (self.rank, width), name)
        b_R = op.param(f"{name}bias", (self.rank,), init.uniform(width**-0.5) if self.drawn else init.zeros)
        if self.activation is not None:
            source_BSR = op.activation(self.activation, op.linear(h_BSD, w_RD, b_R))
            if self.subtract:
                source_BSR = op.call(aten.sub.Tensor, source_BSR, op.linear(h_BSD, r_RD))
        else:
            source_BSR = op.linear(h_BSD, op.call(aten.sub.Tensor, w_RD, r_RD) if self.subtract else w_RD, b_R)
        return op.dropout(op.add(h_BSD, op.call(aten.matmul.default, source_BSR, r_RD)), self.dropout)

    def matrices(self, op: Builder, shape: tuple[int, int], name: str) -> tuple[fx.Node, fx.Node]:
        """W and R."""
        first: list[Tensor] = []

        def draw(tensor: Tensor) -> None:
            (init.orthonormal if self.orthogonal else init.kaiming)(tensor)
            first.append(tensor)

        def same(tensor: Tensor) -> None:
            tensor.copy_(orthonormalise_tensor(first[0]) if self.orthogonal else first[0])

        if self.orthogonal:
            r_RD = op.mark_derived(f"{name}projection", orthonormalise(op, op.param(f"{name}directions", shape, draw)))
        else:
            r_RD = op.param(f"{name}projection", shape, draw)
        identity = same if self.subtract else init.zeros
        return op.param(f"{name}weight", shape, init.kaiming if self.drawn else identity), r_RD

    @property
    def drawn(self) -> bool:
        """Whether W and b start at random."""
        return self.start == "paper"
