"""Rows of a table of tokens: against the table written out by hand, who reads it, how it folds, what is refused."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

import peftgraph as pg
from peftgraph.passes import DoRA, LoRA, Prompt, Train, TrainableTokens

F64 = torch.float64
TOKENS = (60, *range(3, 40, 2))


class Rows(nn.Module):
    """A table in which some rows are a parameter; looked up, or multiplied with."""

    def __init__(self, table: Tensor, look: bool, padding: int | None = None) -> None:
        super().__init__()
        self.table, self.look, self.padding = table.detach().clone(), look, padding
        self.rows = nn.Parameter(self.table[list(TOKENS)].clone())

    def forward(self, x: Tensor) -> Tensor:
        whole = self.table.index_copy(0, torch.tensor(TOKENS), self.rows)
        return embedding(x, whole, padding_idx=self.padding) if self.look else linear(x, whole)


@pytest.mark.parametrize(("at", "module"), [("embedding", "tok"), ("head", "vocab")])
def test_equation(bench: Any, at: str, module: str) -> None:
    tuned = zoo.randomise(bench.program.apply(TrainableTokens(tokens=TOKENS, at=at)), 0.3)
    reference = bench.plain()
    setattr(reference, module, Rows(getattr(reference, module).weight, look=at == "embedding"))
    bench.agree(tuned, reference, {"trainable_tokens.tokens": getattr(reference, module).rows})


def test_the_embedding_and_the_head_by_themselves(bench: Any) -> None:
    both = (TrainableTokens(tokens=TOKENS), TrainableTokens(tokens=TOKENS, at="head", name="head"))
    tuned = zoo.randomise(bench.program.apply(*both), 0.3)
    reference = bench.plain()
    reference.tok, reference.vocab = Rows(reference.tok.weight, True), Rows(reference.vocab.weight, False)
    same = {"trainable_tokens.tokens": reference.tok.rows, "trainable_tokens.head.tokens": reference.vocab.rows}
    bench.agree(tuned, reference, same)
    folded = pg.fold(tuned)
    for name, rows in (("tok.weight", reference.tok.rows), ("vocab.weight", reference.vocab.rows)):
        assert torch.equal(folded.table[name].tensor[list(TOKENS)], rows)


def test_padding_gets_no_gradient_as_in_the_model_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(zoo.VOCAB, 8, padding_idx=5), nn.Linear(8, 4)).to(F64)
    ids = torch.tensor([[5, 7, 3], [7, 5, 9]])
    tuned = pg.trace(model, ids).apply(TrainableTokens(tokens=TOKENS))
    model[0] = Rows(model[0].weight, look=True, padding=5)
    tuned.module()(ids).square().sum().backward()
    model(ids).square().sum().backward()
    ours = tuned.table.trainable["trainable_tokens.tokens"].grad
    torch.testing.assert_close(ours, model[0].rows.grad)
    assert ours is not None
    assert not ours[TOKENS.index(5)].any()
    assert ours[TOKENS.index(7)].any()


# who reads the table


@pytest.mark.parametrize(("name", "sites", "ties"), [
    ("llama", ["embedding", "head"], 2), ("t5", ["encoder.embedding", "decoder.embedding", "head"], 4),
    ("bart", ["encoder.embedding", "decoder.embedding"], 3), ("nano", ["embedding"], 1), ("bert", ["embedding"], 1),
])  # fmt: skip
def test_all_who_share_the_table_have_the_rows_and_the_tie_stays(name: str, sites: list[str], ties: int) -> None:
    base = zoo.traced(name)
    tuned = zoo.randomise(base.apply(TrainableTokens(tokens=TOKENS)), 0.3)
    assert [edit.site for edit in tuned.edits] == sites
    count, size = tuned.count(), len(TOKENS) * zoo.WIDTH
    assert count.trainable == count.added == count.changed == size
    assert [(change.rank, change.full, change.values) for change in count.changes] == [(len(TOKENS), False, size)]
    folded = pg.fold(tuned)
    assert folded.table.ties() == base.table.ties()
    assert len(folded.proof.changed) == ties
    assert folded.proof.split == ()
    before, after = (program.table[next(iter(folded.proof.changed))].tensor for program in (base, folded))
    assert torch.equal(after[list(TOKENS)], tuned.table.trainable["trainable_tokens.tokens"])
    kept = [one for one in range(zoo.VOCAB) if one not in TOKENS]
    assert torch.equal(after[kept], before[kept])


def test_one_stack_of_two_that_share_a_table_means_both() -> None:
    base = zoo.traced("t5")
    some, all_ = (base.apply(TrainableTokens(tokens=(3,), at=at)) for at in ('embedding&stack("decoder")', "head"))
    assert {edit.site for edit in some.edits} == {edit.site for edit in all_.edits}
    assert len(some.edits) == 3


def bert(**inputs: Tensor) -> pg.Program:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=zoo.VOCAB, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=80,
        max_position_embeddings=128,
    )  # fmt: skip
    return pg.trace(BertForMaskedLM(config).eval(), {"input_ids": torch.randint(3, zoo.VOCAB, (2, 7)), **inputs})


def test_types_and_positions_are_no_tokens() -> None:
    types, positions = torch.zeros(2, 7, dtype=torch.long), torch.arange(7).expand(2, -1)
    base = bert(token_type_ids=types, position_ids=positions)
    assert len(base.sites.select("embedding")) == 3
    tuned = base.apply(TrainableTokens(tokens=(3, 9)))
    assert [edit.site for edit in tuned.edits] == ["embedding.0", "head"]
    for part in ("token_type", "position"):
        with pytest.raises(pg.NoMatch, match="none of the 1 sites at .* embeds the tokens of a sequence, nor is it"):
            base.apply(TrainableTokens(tokens=(1,), at=f'embedding.where(path=".*{part}.*")'))


def test_a_tied_head_keeps_its_bias() -> None:
    base = bert()
    tuned = zoo.randomise(base.apply(TrainableTokens(tokens=TOKENS)), 0.3)
    head = base.sites.select("head")[0]
    assert head.bias is not None
    assert pg.fold(tuned).table[head.bias.parameter].tensor is base.table[head.bias.parameter].tensor


# beside other passes


@pytest.mark.parametrize("first", [True, False])
def test_what_others_do_is_done_to_the_new_rows_too(first: bool) -> None:
    base = zoo.traced("llama", "sdpa", F64)
    passes = [TrainableTokens(tokens=TOKENS), LoRA(at="embedding|head|attention.q", rank=2)]
    tuned = zoo.randomise(base.apply(*(passes if first else passes[::-1])), 0.3)
    folded = pg.fold(tuned)
    p, rows = tuned.table.trainable, list(TOKENS)
    change_DV = 8 * (p["model.embed_tokens.lora_B"] @ p["model.embed_tokens.lora_A"])
    wanted = p["trainable_tokens.tokens"] + change_DV.t()[rows]
    torch.testing.assert_close(folded.table["lm_head.weight"].tensor[rows], wanted.detach())
    assert folded.table.ties() == base.table.ties()
    assert tuned.remove(0).remove(0).text() == base.text()


def test_two_passes_with_tokens_of_their_own() -> None:
    base = zoo.traced("llama", "sdpa", F64)
    two = base.apply(TrainableTokens(tokens=(9, 4)), TrainableTokens(tokens=(5, 30), name="b"))
    one = base.apply(TrainableTokens(tokens=(9, 4, 5, 30)))
    zoo.randomise(two, 0.3)
    with torch.no_grad():
        parts = [two.table.trainable[f"trainable_tokens.{name}tokens"] for name in ("", "b.")]
        one.table.trainable["trainable_tokens.tokens"].copy_(torch.cat(parts))
    a, b = (pg.fold(program).table["lm_head.weight"].tensor for program in (two, one))
    assert torch.equal(a, b)
    with pytest.raises(pg.Conflict, match=r'tokens=\[5\] .*name="c"} and .*tokens=\[5, 30\].* both train token 5 '):
        two.apply(TrainableTokens(tokens=(5,), name="c"))


def test_with_the_whole_embedding_and_with_a_prompt() -> None:
    base = zoo.traced("llama", "sdpa", F64)
    for others in ((Train(at="embedding"),), (Train(at="embedding"), LoRA(rank=2))):
        tuned = zoo.randomise(base.apply(TrainableTokens(tokens=TOKENS), *others), 0.3)
        rows = tuned.table.trainable["trainable_tokens.tokens"]
        assert torch.equal(pg.fold(tuned).table["model.embed_tokens.weight"].tensor[list(TOKENS)], rows)
    ids = torch.randint(3, zoo.VOCAB, (2, 9))
    outputs: list[Tensor] = []
    for order in (1, -1):
        passes = [TrainableTokens(tokens=TOKENS), Prompt(length=2)][::order]
        tuned = base.apply(*passes)
        torch.manual_seed(4)
        for _, parameter in sorted(tuned.table.trainable.items()):
            nn.init.normal_(parameter)
        outputs.append(tuned.module().eval()(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"])
    assert torch.equal(*outputs)


def test_dora_at_the_table_is_refused_and_not_folded_wrongly() -> None:
    tuned = zoo.randomise(zoo.traced("nano").apply(TrainableTokens(tokens=(3,)), DoRA(at="embedding", rank=2)), 0.3)
    with pytest.raises(pg.NoFold, match="tok.weight is read in 2 places"):
        pg.fold(tuned)


# sizes and refusals


def test_sizes(real: Any) -> None:
    count = real("llama-7b").apply(TrainableTokens(tokens=tuple(range(31990, 32000)))).count()
    assert count.trainable == count.added == count.changed == 10 * 4096


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tokens": ()}, "trainable_tokens: tokens must name at least one token."),
    ({"tokens": (3, 5, 3)}, "trainable_tokens: token 3 is named twice."),
    ({"tokens": (-1,)}, "trainable_tokens: a token is a whole number from 0 on, got -1."),
    ({"tokens": (1.5,)}, "trainable_tokens: option 'tokens' cannot be (1.5,): expected a whole number."),
    ({"tokens": (4, 61)}, "trainable_tokens: token 61 is outside of the table of embedding at tok, whose tokens are 0 "
     "to 60. Where the vocabulary was resized, resize the model before it is traced."),
    ({"tokens": (4,), "at": "embedding|head"}, "trainable_tokens: embedding at tok and head at vocab have tables of "
     'their own. Choose one with at=, and give each other one a pass with a name="..." of its own.'),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refusals(nano: pg.Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(pg.RecipeError) as caught:
        nano.apply(TrainableTokens(**options))
    assert str(caught.value) == message


@given(
    tokens=st.lists(st.integers(0, 10**6), min_size=1, unique=True),
    at=st.sampled_from(["embedding", "head", 'embedding&stack("decoder")']),
    name=st.sampled_from(["", "a"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = TrainableTokens(**options)
    assert pg.parse_pass(str(method)) == method


DIFF = """
    trainable_tokens{tokens=[5, 6] at=head}
    trainable_tokens{tokens=[9, 3] at=embedding name="e"} as 'e'
        %embedding: f32[B, S, 48] = embedding(@tok.weight, %idx)
      + %embedding.trainable_tokens.e.embedding: i64[B, S, 1] = embedding(@tok.e.slots, %idx)
      + %embedding.trainable_tokens.e.squeeze: i64[B, S] = squeeze(%embedding.trainable_tokens.e.embedding, -1)
      + %embedding.trainable_tokens.e.clamp: i64[B, S] = clamp(%embedding.trainable_tokens.e.squeeze, 0)
      + %embedding.trainable_tokens.e.embedding#2: f32[B, S, 48] = embedding(@trainable_tokens.e.tokens*, %embedding.trainable_tokens.e.clamp)
      + %embedding.trainable_tokens.e.ge: bool[B, S, 1] = ge(%embedding.trainable_tokens.e.embedding, 0)
      + %embedding.trainable_tokens.e.where: f32[B, S, 48] = where(%embedding.trainable_tokens.e.ge, %embedding.trainable_tokens.e.embedding#2, %embedding)
      - %0.add: f32[B, S, 48] = add(%embedding, %embedding.embedding)
      + %0.add: f32[B, S, 48] = add(%embedding.trainable_tokens.e.where, %embedding.embedding)
        %head: f32[B, S, 61] = linear(%norm, @vocab.weight)
      + %head.trainable_tokens.slice: f32[2, 48] = slice(@vocab.weight, -2, 5, 7)
      + %head.trainable_tokens.sub: f32[2, 48] = sub(@trainable_tokens.tokens*, %head.trainable_tokens.slice)
      + %head.trainable_tokens.linear: f32[B, S, 2] = linear(%norm, %head.trainable_tokens.sub)
      + %head.trainable_tokens.slice#2: f32[B, S, 2] = slice(%head, -1, 5, 7)
      + %head.trainable_tokens.add: f32[B, S, 2] = add(%head.trainable_tokens.slice#2, %head.trainable_tokens.linear)
      + %head.trainable_tokens.slice_scatter: f32[B, S, 61] = slice_scatter(%head, %head.trainable_tokens.add, -1, 5, 7)
      - return [%head]
      + return [%head.trainable_tokens.slice_scatter]
    2 sites, +12 nodes, -0 nodes, 2 lines changed, +2 parameters (192 trainable values)
"""  # noqa: E501


def test_text(nano: pg.Program) -> None:
    tuned = nano.apply(TrainableTokens(tokens=(5, 6), at="head"), TrainableTokens(tokens=(9, 3), name="e"))
    assert tuned.diff(nano) == dedent(DIFF).lstrip("\n")
    assert tuned.remove(0).remove(0).text() == nano.text()
