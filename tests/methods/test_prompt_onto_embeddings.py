"""Prompts behind the finished embeddings: as the model's own code where its embeddings give the rows as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, DistilBertConfig, DistilBertModel

import peftgraph as pg
from peftgraph.passes import Prompt

F64 = torch.float64
LENGTH = 4
BERTS = ("bert", "roberta", "minilm", "distilbert", "albert")
SMALL: dict[str, Any] = {"vocab_size": zoo.VOCAB, "max_position_embeddings": 64}


def build(name: str) -> nn.Module:
    """A model in float64; one of two more types, of which one embeds in fewer features than its blocks have."""
    torch.manual_seed(0)
    if name == "distilbert":
        return DistilBertModel(DistilBertConfig(dim=48, hidden_dim=80, n_layers=2, n_heads=4, **SMALL)).to(F64).eval()
    if name == "albert":
        sizes = {"embedding_size": 20, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
        return AlbertModel(AlbertConfig(num_hidden_layers=2, **sizes, **SMALL)).to(F64).eval()
    return zoo.build(name, dtype=F64)


def call(name: str, batch: int = 2, length: int = 9) -> dict[str, Any]:
    """A padded batch."""
    return zoo.example(name if name in zoo.NAMES else "bert", batch, length, F64)


@cache
def traced(name: str) -> pg.Program:
    return zoo.traced(name, "sdpa", F64) if name in zoo.NAMES else pg.trace(build(name), call(name, 3, 7))


def tuned(program: pg.Program, **options: Any) -> tuple[pg.Program, Tensor]:
    """The program after a prompt, and the prompt."""
    torch.manual_seed(1)
    after = program.apply(Prompt(length=LENGTH, init="normal", onto="embeddings", **options))
    (rows,) = after.table.trainable.values()
    return after, rows


@contextmanager
def longer(model: nn.Module, rows: Tensor, after: int = 0) -> Iterator[nn.Module]:
    """The model while its embeddings give the rows as well."""
    net = getattr(model, "roberta", model)

    def hook(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        return torch.cat([embedded[:, :after], rows.expand(len(embedded), -1, -1), embedded[:, after:]], 1)

    handle = net.embeddings.register_forward_hook(hook)
    try:
        yield model
    finally:
        handle.remove()


def with_ones(mask: Tensor) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), LENGTH), mask], 1)


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max().detach()) <= tolerance * float(b.abs().max().detach())


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("name", BERTS)
def test_the_models_own_code_gives_the_same(name: str, after: int) -> None:
    model, inputs = build(name).requires_grad_(False), call(name)
    place = ("front", "after_first")[after]
    ours, rows = tuned(traced(name), place=place, returns="all")
    cut, other = tuned(traced(name), place=place)
    again = rows.detach().clone().requires_grad_()
    with longer(model, again, after):
        theirs = zoo.leaves(model(**inputs | {"attention_mask": with_ones(inputs["attention_mask"])}))
    mine = zoo.leaves(ours.module().eval()(**inputs))
    close(mine, theirs)
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), p) for outs, p in ((mine, rows), (theirs, again))
    ]
    close(list(grads[0]), list(grads[1]), 1e-11)
    assert torch.equal(other, rows)
    kept = [torch.cat([x[:, :after], x[:, after + LENGTH :]], 1) if x.dim() == 3 else x for x in theirs]
    close(zoo.leaves(cut.module().eval()(**inputs)), kept)


def test_types_and_positions_stay_the_tokens_own() -> None:
    model = zoo.build("bert", dtype=F64)
    inputs = call("bert")
    inputs["position_ids"] = torch.arange(3, 12).expand(2, -1).clone()
    inputs["token_type_ids"] = torch.randint(0, 2, (2, 9))
    program, rows = tuned(pg.trace(model, inputs))
    with longer(model, rows.detach()):
        theirs = model(**inputs | {"attention_mask": with_ones(inputs["attention_mask"])})
    ours = program.module().eval()(**inputs)
    close([ours.last_hidden_state, ours.pooler_output], [theirs.last_hidden_state[:, LENGTH:], theirs.pooler_output])


def test_a_causal_models_rows_have_no_position() -> None:
    model, inputs = zoo.build("gpt2", dtype=F64), call("gpt2")
    inputs["labels"] = inputs["input_ids"].clone()
    program, rows = tuned(pg.trace(model, inputs))
    table = model.transformer.wpe.weight.detach()
    embedded = model.transformer.wte(inputs["input_ids"])
    front = torch.zeros(2, LENGTH, dtype=torch.long)
    theirs = model(
        inputs_embeds=torch.cat([(rows.detach() - table[0]).expand(2, -1, -1), embedded], 1),
        position_ids=torch.cat([front, torch.arange(9).expand(2, -1)], 1),
        attention_mask=with_ones(inputs["attention_mask"]),
        labels=torch.cat([front - 100, inputs["labels"]], 1),
    )
    ours = program.module().eval()(**inputs)
    close([ours.loss, ours.logits], [theirs.loss, theirs.logits[:, LENGTH:]])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5"])
def test_where_embeddings_are_the_tokens_alone_both_ways_are_one(name: str) -> None:
    """Positions that turn in the attention, and distances, count the rows."""
    inputs = call(name)
    inputs["attention_mask"][:] = 1
    if name != "t5":
        inputs["position_ids"] = torch.arange(9).expand(2, -1).clone()
    base = pg.trace(zoo.build(name, dtype=F64), inputs)
    behind, rows = tuned(base)
    among = base.apply(Prompt(length=LENGTH))
    with torch.no_grad():
        next(iter(among.table.trainable.values())).copy_(rows)
    close(*(zoo.leaves(program.module().eval()(**inputs)) for program in (behind, among)), 1e-12)


def test_what_stands_before_the_rows_is_worked_out_once() -> None:
    base = zoo.traced("bert", "sdpa", F64)
    program, _ = tuned(base)
    lookups = [one.text().count("= embedding(") for one in (base, program)]
    assert lookups == [3, 3]  # tokens, types, positions


def test_the_table_of_positions_may_be_full() -> None:
    program, _ = tuned(zoo.traced("bert"))
    assert program.module().eval()(**zoo.example("bert", 1, 64)).last_hidden_state.shape == (1, 64, 48)


class Early(nn.Module):
    """Adds what it looked up to the answer of its layer again."""

    def __init__(self, two: bool = False) -> None:
        super().__init__()
        self.two = two
        self.embed, self.place = nn.Embedding(31, 12), nn.Embedding(31, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        embedded, more = self.embed(tokens), self.place(others)
        return self.layer(embedded + more) + (0 if self.two else embedded)


@pytest.mark.parametrize(
    ("two", "words"), [(False, "read before it is finished"), (True, "embed one sequence of tokens")]
)
def test_what_has_no_one_place_is_refused(two: bool, words: str) -> None:
    torch.manual_seed(0)
    inputs = {name: torch.randint(0, 31, (2, 7)) for name in ("tokens", "others")}
    at = "embedding" if two else pg.embedding.where(path="embed")
    with pytest.raises(pg.PeftGraphError, match=words):
        pg.trace(Early(two), inputs).apply(Prompt(at=at, length=2, onto="embeddings"))


def test_continued_calls_and_wide_masks_are_refused() -> None:
    with pytest.raises(pg.PeftGraphError, match="without a cache"):
        zoo.cached("gpt2").apply(Prompt(length=2, onto="embeddings"))
    inputs = call("gpt2")
    inputs["attention_mask"] = torch.zeros(2, 1, 9, 9, dtype=F64)
    with pytest.raises(pg.PeftGraphError, match=r"only inputs \(batch, tokens\) can be made longer"):
        pg.trace(zoo.build("gpt2", dtype=F64), inputs).apply(Prompt(length=2, onto="embeddings"))
