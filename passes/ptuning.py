"""P-tuning (Liu et al., 2021): embeddings at chosen positions of the input, computed by a small network.

    E[pseudo tokens]   ->   h,    h = W_2 relu(W_1 BiLSTM(P) + b_1) + b_2
    no fold: the rows are attended to, and no weight stores rows of a sequence

At a template's pseudo tokens the input contains the id `token`: the k-th one of an example is embedded as h_k,
whatever is in between. The id may be outside the vocabulary. Without `token` the rows are prepended to the input, as
in peft; masks, positions and labels then grow as for `Prompt`. encoder="lstm" is the paper's; hidden=none gives its
LSTM D / 2 features per direction. encoder="mlp" is peft's: three layers with relu in between. After training
`finalize()` runs the encoder once and keeps h alone (encoder="none"). The model stays frozen, as in the paper's LAMA
experiments; in the few-shot ones the authors' code trains it as well.
Shapes: L length, D features of the embedding, M hidden, P (L, D), h (L, D). P starts standard normal, the networks
as torch.nn.LSTM and torch.nn.Linear.
Source: arXiv 2103.10385, section 3.2, equation 5; THUDM/P-tuning, LAMA/p_tuning/prompt_encoder.py.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.authoring.sequence import PrependTokens, PromptRows, prepend_token_rules, replace_token_rule

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class PTuning(Pass):
    """Rows computed by an encoder, at the pseudo tokens of a template.

    Attributes:
        at: embeddings of tokens.
        length: L, how many pseudo tokens there are in an example.
        token: the id of the pseudo token in the input; none prepends the rows.
        encoder: "lstm", "mlp", or "none" for rows that train themselves.
        hidden: M of the encoder; none for D / 2 per direction in an LSTM, and D in an MLP.
    """

    word = "ptuning"
    at: pg.Selector = pg.embedding & ~pg.stack("decoder")
    length: int = 9
    token: int | None = None
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    hidden: int | None = None

    def check(self) -> None:
        """Refuse sizes below 1, a negative token and an unknown encoder."""
        self.require(self.length >= 1, f"length must be at least 1, got {self.length}.")
        self.require(self.token is None or self.token >= 0, f"token must be at least 0 or none, got {self.token}.")
        self.require_one_of("encoder", ("lstm", "mlp", "none"))
        self.require(self.hidden is None or self.hidden >= 1, f"hidden must be at least 1 or none, got {self.hidden}.")

    def rules(self) -> list[Rule]:
        """Embed the pseudo tokens as rows of h; or prepend these to the tokens."""
        reason = "the rows are attended to, and no weight stores rows of a sequence"
        if self.token is None:
            return prepend_token_rules(self.at, PrependTokens(rows=self.length), self.rows, reason, trim_results=True)
        return [replace_token_rule(self.at, self.token, self.rows, reason)]

    def finalized(self) -> Self:
        """Return the same rows without their encoder."""
        return replace(self, encoder="none", hidden=None)

    def prompt_rows(self) -> PromptRows | None:
        """Return the rows h, where they are prepended and no encoder computes them."""
        plain = self.token is None and self.encoder == "none"
        return PromptRows(self.at, self.length, 0, True) if plain else None

    def rows(self, m: Match, op: Builder) -> fx.Node:
        """Return h, (L, D)."""
        if self.encoder == "none":
            return op.param("prompt", (self.length, m.features), init.normal(1.0))
        start_LD = op.param("start", (self.length, m.features), init.normal(1.0))
        encode = self.through_lstm if self.encoder == "lstm" else self.through_mlp
        return op.mark_derived("prompt", encode(op, start_LD, m.features))

    def through_lstm(self, op: Builder, start_LD: fx.Node, width: int) -> fx.Node:
        """W_2 relu(W_1 BiLSTM(P) + b_1) + b_2."""
        hidden = self.hidden or width // 2
        drawn = init.uniform(hidden**-0.5)
        weights: list[fx.Node] = []
        for layer in range(2):
            for way in ("", "_reverse"):
                inner = 2 * hidden if layer else width
                shapes = {"weight_ih": (4 * hidden, inner), "weight_hh": (4 * hidden, hidden)}
                shapes |= {"bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}
                weights += [op.param(f"lstm_{name}_l{layer}{way}", shape, drawn) for name, shape in shapes.items()]
        empty = op.call(aten.new_zeros.default, start_LD, [4, 1, hidden])
        batch = op.call(aten.unsqueeze.default, start_LD, 0)
        run = op.call(aten.lstm.input, batch, [empty, empty], weights, True, 2, 0.0, False, True, True)
        states_LM = op.call(aten.squeeze.dim, op.call(operator.getitem, run, 0), 0)
        return self.layers(op, states_LM, (2 * hidden, 2 * hidden, width))

    def through_mlp(self, op: Builder, start_LD: fx.Node, width: int) -> fx.Node:
        """W_3 relu(W_2 relu(W_1 P + b_1) + b_2) + b_3."""
        hidden = self.hidden or width
        return self.layers(op, start_LD, (width, hidden, hidden, width))

    @staticmethod
    def layers(op: Builder, x: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
        """Linear layers with a relu between them."""
        for i, (inner, outer) in enumerate(pairwise(sizes)):
            weight = op.param(f"layer{i}_weight", (outer, inner), init.kaiming)
            bias = op.param(f"layer{i}_bias", (outer,), init.uniform(inner**-0.5))
            x = op.linear(op.activation("relu", x) if i else x, weight, bias)
        return x
