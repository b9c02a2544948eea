"""A prefix beside trained biases of the distance: keys are counted from its first row on, or there are no biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attended
import distances
import pytest
import torch
import truth
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import Prefix

F64 = torch.float64
Mix = Callable[[Tensor, Tensor], Tensor]


def tuned(biases: str, attn: str = "sdpa") -> pg.Program:
    torch.manual_seed(1)
    method = Prefix(length=3, hidden=None, biases=biases)  # pyright: ignore[reportArgumentType]
    return zoo.randomise(zoo.traced("t5", attn, F64).apply(method), 0.5)


def rows(program: pg.Program) -> list[attended.Rows]:
    """P_K and P_V of every attention, in the order of the graph."""
    given = iter(program.table.trainable.values())
    return list(zip(given, given, strict=True))


def with_rows_of(source: pg.Program, program: pg.Program) -> pg.Program:
    """A program whose rows have been given the values of another's."""
    with torch.no_grad():
        for own, value in zip(program.table.trainable.values(), source.table.trainable.values(), strict=True):
            own.copy_(value)
    return program


def inputs() -> dict[str, Tensor]:
    """A text that reaches over the distances with a bucket of their own, half of it padded, in both stacks."""
    torch.manual_seed(2)
    return zoo.example("t5", 2, 11) | {"decoder_input_ids": torch.randint(3, zoo.VOCAB, (2, 21))}


def answer(module: nn.Module, given: dict[str, Any]) -> Tensor:
    return zoo.leaves(module(**given))[0]


@pytest.mark.parametrize("attn", zoo.ATTENTIONS)
@pytest.mark.parametrize("biases", ["shifted", "dropped"])
def test_outputs_and_gradients_are_the_equation_s(biases: str, attn: str) -> None:
    program, model, given = tuned(biases, attn), truth.eager_model("t5", F64), inputs()
    ours = answer(program.module().eval(), given)
    dropped = ("encoder", "decoder") if biases == "dropped" else ()
    with attended.attending(distances.with_counted, distances.counted(model, rows(program), given, dropped)):
        theirs = answer(model, given)
    largest = float(theirs.detach().abs().max())
    assert float((ours - theirs).detach().abs().max()) < 1e-12 * largest
    kept = with_rows_of(program, tuned("kept", attn))
    assert float((ours - answer(kept.module().eval(), given)).detach().abs().max()) > 1e-3 * largest
    parameters, weights = list(program.table.trainable.values()), torch.randn_like(theirs)
    grads = [torch.autograd.grad((out * weights).sum(), parameters) for out in (ours, theirs)]
    scale = max(float(grad.abs().max()) for grad in grads[1])
    assert max(float((got - want).abs().max()) for got, want in zip(*grads, strict=True)) < 1e-11 * scale


@pytest.mark.parametrize("biases", ["shifted", "dropped"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "nano"])
def test_without_trained_biases_nothing_changes(name: str, biases: Any) -> None:
    given = zoo.example(name, 2, 9, F64)
    one, other = (
        zoo.traced(name, "sdpa", F64).apply(Prefix(length=3, hidden=None, biases=way)) for way in ("kept", biases)
    )
    assert torch.equal(*(answer(p.module().eval(), given) for p in (one, with_rows_of(one, other))))


class Near(nn.Module):
    """Causal attention with a trained bias for each distance up to 15, which `mix` joins with the mask."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.biases, self.mix = nn.Embedding(31, 3), mix

    def distance(self, queries: int, keys: int) -> Tensor:
        return self.biases(torch.arange(keys) - torch.arange(queries)[:, None] + 15).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        places = torch.arange(x.shape[1])
        mask = torch.zeros((), dtype=x.dtype).where(places <= places[:, None], -1e9)
        weights = (q @ k.transpose(-2, -1) / 2 + self.mix(self.distance(x.shape[1], x.shape[1]), mask)).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


MIXES: dict[str, Mix] = {
    "bias-first": lambda bias, mask: bias + mask,
    "mask-first": lambda bias, mask: (mask + bias).contiguous(),
    "chosen": lambda bias, mask: torch.where(mask < 0, -1e9, bias),
    "masked-where": lambda bias, mask: torch.where(mask < 0, -1e9 + mask, bias),
    "filled": lambda bias, mask: bias.masked_fill(mask < 0, -1e9).to(F64),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("biases", ["shifted", "dropped"])
def test_masks_are_told_from_the_biases_that_they_meet(biases: Any, mix: str) -> None:
    torch.manual_seed(0)
    model, x = Near(MIXES[mix]).to(F64), torch.randn(2, 7, 12, dtype=F64)
    method = Prefix(length=2, hidden=None, biases=biases)
    program = zoo.randomise(pg.trace(model, (torch.randn(2, 5, 12, dtype=F64),)).apply(method), 1.0)
    key, value = (p.view(2, 3, 4).transpose(0, 1).expand(2, 3, 2, 4) for p in program.table.trainable.values())
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (model.q, model.k, model.v))
    scores = q @ torch.cat([key, k], 2).transpose(-2, -1) / 2
    if biases == "shifted":
        scores = scores + model.distance(7, 9)
    open_to = torch.cat([torch.ones(7, 2), torch.ones(7, 7).tril()], 1) > 0
    heads = scores.masked_fill(~open_to, -torch.inf).softmax(-1) @ torch.cat([value, v], 2)
    wanted = x + model.o(heads.transpose(1, 2).flatten(2))
    assert float((program.module()(x) - wanted).detach().abs().max()) < 1e-12


UNTOLD: dict[str, tuple[Mix, str]] = {
    "subtracted": (lambda bias, mask: mask - bias, "sub.Tensor"),
    "multiplied": (lambda bias, mask: bias * (1 - mask), "mul.Tensor"),
    "twice": (lambda bias, mask: torch.add(mask, bias, alpha=2), "add.Tensor"),
    "two": (lambda bias, mask: torch.where(mask < 0, bias - 1e9, bias), "where.self"),
}


@pytest.mark.parametrize("mix", UNTOLD)
@pytest.mark.parametrize("biases", ["shifted", "dropped"])
def test_where_they_cannot_be_told_apart_they_are_refused(biases: Any, mix: str) -> None:
    change, word = UNTOLD[mix]
    program = pg.trace(Near(change), (torch.randn(2, 5, 12),))
    with pytest.raises(pg.PeftGraphError, match=rf"mixes its biases with a mask at %.* \(aten.{word}\)"):
        program.apply(Prefix(length=2, hidden=None, biases=biases))
    assert len(program.apply(Prefix(length=2, hidden=None)).edits) == 1


class Fixed(Near):
    """The same with a bias for each pair of five tokens."""

    def __init__(self) -> None:
        super().__init__(lambda bias, mask: bias + mask)
        self.pairs = nn.Parameter(torch.randn(3, 5, 5))

    def distance(self, queries: int, keys: int) -> Tensor:
        return self.pairs


def test_biases_of_pairs_of_tokens_are_none_of_the_distance() -> None:
    program = pg.trace(Fixed(), (torch.randn(2, 5, 12),))
    with pytest.raises(pg.PeftGraphError, match="are the same for any number of tokens: there are none for 2 more"):
        program.apply(Prefix(length=2, hidden=None, biases="shifted"))


@pytest.mark.parametrize("biases", ["shifted", "dropped"])
def test_biases_that_depend_on_more_than_the_distance_are_refused(biases: Any) -> None:
    with pytest.raises(pg.PeftGraphError, match="a product of the model's own, to its scores, and no bias of the"):
        zoo.traced("deberta").apply(Prefix(length=3, hidden=None, biases=biases))


def test_options_are_checked() -> None:
    with pytest.raises(pg.RecipeError, match='biases must be "kept" or "shifted" or'):
        Prefix(biases="lost")  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.RecipeError, match="placed=true says already where biases fall"):
        Prefix(placed=True, biases="shifted")
    assert 'biases="shifted"' in str(Prefix(biases="shifted"))
    assert "biases" not in str(Prefix())
