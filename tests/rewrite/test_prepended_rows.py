"""Prepended rows against plain PyTorch: where they stand, what positions they have, and what is left once they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass, Replace, Rule
from peftgraph.authoring.modules import init
from peftgraph.passes import Invertible, Prefix, Prompt, PTuning, SerialAdapter, TrainableTokens

F64 = torch.float64
LENGTH, WIDTH, HEADS = 3, 12, 3


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary: pairs of features of x (B, H, T, F) turned by the positions (B, T)."""
    angles = positions[:, None, :, None] * torch.tensor([1.0, 0.3], dtype=F64)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Layer(nn.Module):
    """A pre-norm block, with positions where it is given any, and else a bias of the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, bias: Tensor, positions: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        h = self.before(x)
        q, k, v = (part(h).view(batch, length, HEADS, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        if positions is not None:
            q, k = turned(q, positions), turned(k, positions)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


def hidden(mask: Tensor) -> Tensor:
    """What is added to scores, (B, 1, 1, T)."""
    return torch.where(mask[:, None, None, :] != 0, 0.0, -1e9).to(F64)


class Numbered(nn.Module):
    """An encoder whose positions are an input, and turn queries and keys; its answer is read at the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.answer = nn.Embedding(31, WIDTH), Layer(), nn.Linear(WIDTH, 4)

    def forward(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.run(self.words(tokens), mask, positions)

    def run(self, x: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer(x, hidden(mask), positions)
        return x, self.answer(x[:, 0])


def call(batch: int, length: int) -> dict[str, Tensor]:
    """Positions start at 2, so that what counts from 0 is seen."""
    positions = torch.arange(2, 2 + length).expand(batch, -1).clone()
    tokens = torch.randint(0, 31, (batch, length))
    return {"tokens": tokens, "mask": torch.ones(batch, length, dtype=torch.long), "positions": positions}


def built(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model().to(F64).eval().requires_grad_(False)


@cache
def numbered() -> pg.Program:
    return pg.trace(built(Numbered), call(2, 7))


def with_rows(model: Any, inputs: dict[str, Tensor], rows: Tensor, after: int) -> tuple[Tensor, Tensor]:
    """The model's own code on [x_1 .. x_after, P, x_after+1 ..]: rows take the next positions, and tokens count on."""
    tokens, mask, positions = inputs.values()
    batch, first = len(tokens), positions[:, :1] + min(after, 1)
    x = model.words(tokens)
    x = torch.cat([x[:, :after], rows.expand(batch, -1, -1), x[:, after:]], 1)
    counted = torch.cat([positions[:, :after], first + torch.arange(LENGTH), positions[:, after:] + LENGTH], 1)
    mask = torch.cat([mask[:, :after], mask.new_ones(batch, LENGTH), mask[:, after:]], 1)
    y, answer = model.run(x, mask, counted)
    return torch.cat([y[:, :after], y[:, after + LENGTH :]], 1), answer


def tuned(program: pg.Program, **options: Any) -> tuple[pg.Program, Tensor]:
    program = program.apply(Prompt(length=LENGTH, init="normal", **options))
    (rows,) = program.table.trainable.values()
    return program, rows.detach()


@pytest.mark.parametrize("onto", ["tokens", "embeddings"])
@pytest.mark.parametrize("after", [0, 1])
def test_rows_take_the_positions_after_the_tokens_before_them(after: int, onto: str) -> None:
    program, rows = tuned(numbered(), onto=onto, place=("front", "after_first")[after])
    inputs = call(3, 6)
    inputs["mask"][1, 4:] = 0
    ours, theirs = program.module().eval()(**inputs), with_rows(built(Numbered), inputs, rows, after)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    if after:  # else the model reads its answer at the first row
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)


def test_rows_stand_after_the_first_token_behind_padding() -> None:
    program, rows = tuned(numbered(), place="after_first")
    inputs = call(2, 6)
    inputs["mask"][1, :2] = 0
    inputs["positions"][1] -= 2
    alone = {name: value[1:, 2:] for name, value in inputs.items()}
    ours, (theirs, _) = program.module().eval()(**inputs)[0], with_rows(built(Numbered), alone, rows, 1)
    torch.testing.assert_close(ours[1:, 2:], theirs, rtol=0, atol=1e-12)


class Placed(nn.Module):
    """An encoder of at most 16 positions, with biases of the distance."""

    numbers: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.distances = nn.Embedding(31, WIDTH), nn.Embedding(16, WIDTH), nn.Embedding(64, 3)
        self.norm, self.layer, self.head = nn.LayerNorm(WIDTH), Layer(), nn.Linear(WIDTH, 31)
        self.register_buffer("numbers", torch.arange(16)[None], persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        length = tokens.shape[1]
        at = torch.arange(length)
        x = self.norm(self.words(tokens) + self.places(self.numbers[:, :length]))
        bias = self.distances(at[None] - at[:, None] + 32).permute(2, 0, 1)[None]
        return self.head(self.layer(x, bias + hidden(mask)))


@cache
def placed() -> pg.Program:
    inputs = call(2, 7)
    return pg.trace(built(Placed), {name: inputs[name] for name in ("tokens", "mask")})


def test_rows_take_their_room_from_the_positions_of_the_model() -> None:
    module = placed().apply(Prompt(length=4)).module().eval()
    inputs = call(1, 13)
    assert module(inputs["tokens"][:, :12], inputs["mask"][:, :12]).shape == (1, 12, 31)
    with pytest.raises(pg.PeftGraphError, match=r"13.*12"):
        module(inputs["tokens"], inputs["mask"])
    assert placed().module().eval()(inputs["tokens"], inputs["mask"]).shape == (1, 13, 31)


# what is left without them


class Pictures(nn.Module):
    """Patches, each of which sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, WIDTH, 4, 4), Layer()

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2)
        at = torch.arange(x.shape[1])
        return self.layer(x, torch.where(at[:, None] >= at, 0.0, -1e9).to(x.dtype))


@cache
def patched() -> pg.Program:
    return pg.trace(built(Pictures), {"pictures": torch.randn(2, 3, 8, 12, dtype=F64)})


PROMPT, AFTER = Prompt(length=3), Prompt(length=2, onto="embeddings")
PSEUDO = PTuning(length=2, token=30, encoder="none")
PLACED, ADAPTER = Prefix(length=2, hidden=None, placed=True), SerialAdapter(width=3)
VISUAL, PREFIX = Prompt(at=pg.block, length=2, onto="embeddings"), Prefix(length=2, hidden=None)
# Of two prompts one would undo the other, or does not see tokens of the model any more.
ON_WORDS = [pair for pair in permutations((PROMPT, AFTER, PSEUDO, PLACED, ADAPTER), 2) if {PLACED, ADAPTER} & set(pair)]
ON_PATCHES = [*permutations((VISUAL, PREFIX), 2), (PLACED, VISUAL), (VISUAL, ADAPTER)]


@pytest.mark.parametrize(("traced", "pairs"), [(placed, ON_WORDS), (patched, ON_PATCHES)])
def test_what_is_left_of_two_passes_is_the_other_one_alone(
    traced: Callable[[], pg.Program], pairs: list[tuple[Pass, Pass]]
) -> None:
    base = traced()
    alone = {method: base.apply(method) for method in {method for pair in pairs for method in pair}}
    for pair in pairs:
        both = base.apply(*pair)
        for which in (0, 1):
            rest, wanted = both.remove(which), alone[pair[1 - which]]
            assert rest.text() == wanted.text(), (pair, which)
            assert rest.signature == wanted.signature, (pair, which)
            assert all(value is both.table[key].tensor for key, value in rest.table.trainable.items())


@dataclass(frozen=True, kw_only=True)
class Follower(Pass):
    """A norm's factor, where another pass came before."""

    word = "follower"

    def rules(self) -> list[Rule]:
        """One rule."""
        return [
            Rule(
                at=pg.norm,
                delta=lambda m, op: op.mul(m.output, op.param("factor", (WIDTH,), init.ones)),
                join=Replace(exclusive=False),
                fold="a test",
                where=lambda m: len(m.edits) > 0,
                where_message="comes after another pass",
            )
        ]


def test_what_cannot_be_applied_without_another_pass_keeps_it() -> None:
    both = placed().apply(PROMPT, Follower())
    with pytest.raises(pg.PeftGraphError, match=r"^prompt.* cannot be removed alone, for follower.* Remove what came"):
        both.remove(0)
    assert both.remove(1).text() == placed().apply(PROMPT).text()


# which table is that of tokens


class Tagged(nn.Module):
    """Two tables whose rows are added."""

    def __init__(self, words: int, tags: int) -> None:
        super().__init__()
        self.one, self.two, self.layer = nn.Embedding(words, WIDTH), nn.Embedding(tags, WIDTH), Layer()

    def forward(self, tokens: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        return self.layer(self.one(tokens) + self.two(tags), hidden(mask))


@cache
def tagged(words: int, tags: int) -> pg.Program:
    torch.manual_seed(0)
    numbers = {name: torch.randint(0, 9, (2, 7)) for name in ("tokens", "tags")}
    return pg.trace(built(lambda: Tagged(words, tags)), {**numbers, "mask": torch.ones(2, 7, dtype=torch.long)})


ON_TOKENS: list[Callable[..., Pass]] = [
    lambda **at: Prompt(length=2, **at),
    lambda **at: Prompt(length=2, onto="embeddings", **at),
    lambda **at: PTuning(length=2, encoder="none", **at),
    lambda **at: PTuning(length=2, token=5, encoder="none", **at),
    lambda **at: Invertible(**at),
    lambda **at: TrainableTokens(tokens=(1, 2), **at),
]


def path_of(program: pg.Program) -> set[str]:
    """The modules whose tables the edits of embeddings are at."""
    sites = {site.id: site.path for site in program.sites}
    return {sites[edit.site] for edit in program.edits if edit.site.startswith("embedding")}


def test_of_words_and_tags_the_larger_table_is_that_of_tokens() -> None:
    for sizes, path in (((31, 9), "one"), ((9, 31), "two")):
        for method in ON_TOKENS[:: 1 if path == "one" else 3]:
            assert path_of(tagged(*sizes).apply(method())) == {path}, method()


def test_of_two_tables_that_are_as_large_one_is_chosen() -> None:
    for method in ON_TOKENS:
        with pytest.raises(
            pg.PeftGraphError, match=r"embedding\.0 and embedding\.1 embed one sequence of tokens.*choose .* with at="
        ):
            tagged(9, 9).apply(method())
        assert path_of(tagged(9, 9).apply(method(at=pg.embedding.where(path="two")))) == {"two"}
