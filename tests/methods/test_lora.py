"""LoRA: the equation, its gradients and dropout, how it starts, its published sizes, its options and its text."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import LoRA

D, F = zoo.WIDTH, zoo.FFN


class Path(nn.Module):
    """s (drop(x) A^T) B^T."""

    def __init__(self, inner: int, out: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a_RI = nn.Parameter(torch.zeros(rank, inner, dtype=torch.float64))
        self.b_OR = nn.Parameter(torch.zeros(out, rank, dtype=torch.float64))
        self.scale, self.drop = scale, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.drop(x) @ self.a_RI.T) @ self.b_OR.T


class Beside(nn.Module):
    """A projection with a low-rank path beside it."""

    def __init__(self, base: nn.Linear, path: Path) -> None:
        super().__init__()
        self.base, self.path = base, path

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.path(x)


class BesideFused(nn.Module):
    """A fused projection with paths beside its first and last third."""

    def __init__(self, base: nn.Linear, q: Path, v: Path) -> None:
        super().__init__()
        self.base, self.q, self.v = base, q, v

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return torch.cat([y[..., :D] + self.q(x), y[..., D : 2 * D], y[..., 2 * D :] + self.v(x)], dim=-1)


class BesideTable(nn.Module):
    """An embedding with a low-rank table beside it: its row is a column of A."""

    def __init__(self, base: nn.Embedding, path: Path) -> None:
        super().__init__()
        self.base, self.path = base, path

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + self.path.scale * self.path.a_RI.T[ids] @ self.path.b_OR.T


def pairs(paths: dict[str, Path]) -> dict[str, Tensor]:
    sides = {"lora_A": "a_RI", "lora_B": "b_OR"}
    return {f"{name}.{ours}": getattr(path, own) for name, path in paths.items() for ours, own in sides.items()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equation_on_a_fused_projection(bench: Any, training: bool) -> None:
    tuned = zoo.randomise(bench.program.apply(LoRA(rank=3, alpha=5.0, dropout=0.2)), 0.2)
    reference = bench.plain()
    paths = {f"stack.0.mix.{role}": Path(D, D, 3, 5 / 3, 0.2) for role in "qv"}
    reference.stack[0].mix = BesideFused(reference.stack[0].mix, *paths.values())
    bench.agree(tuned, reference, pairs(paths), training)


def test_equation_on_separate_projections(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(LoRA(at="attention.o|ffn.*|head", rank=4, alpha=2.0)), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    paths = {
        "stack.0.out": Path(D, D, 4, 0.5),
        "stack.0.fc": Path(D, F, 4, 0.5),
        "stack.0.proj": Path(F, D, 4, 0.5),
        "vocab": Path(D, zoo.VOCAB, 4, 0.5),
    }
    block.out, block.fc = Beside(block.out, paths["stack.0.out"]), Beside(block.fc, paths["stack.0.fc"])
    block.proj, reference.vocab = Beside(block.proj, paths["stack.0.proj"]), Beside(reference.vocab, paths["vocab"])
    bench.agree(tuned, reference, pairs(paths))


def test_equation_on_an_embedding(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(LoRA(at="embedding", rank=3, alpha=5.0)), 0.2)
    reference = bench.plain()
    paths = {"tok": Path(zoo.VOCAB, D, 3, 5 / 3)}
    reference.tok = BesideTable(reference.tok, paths["tok"])
    bench.agree(tuned, reference, pairs(paths))


def test_fold_is_the_weight_of_the_equation(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(LoRA(rank=3, alpha=5.0)), 0.2)
    p, mix = tuned.table.trainable, bench.program.table["stack.0.mix.weight"].tensor
    update = [5 / 3 * p[f"stack.0.mix.{role}.lora_B"] @ p[f"stack.0.mix.{role}.lora_A"] for role in "qv"]
    expected = mix + torch.cat([update[0], torch.zeros_like(update[0]), update[1]])
    folded = pg.fold(tuned).table["stack.0.mix.weight"].tensor
    torch.testing.assert_close(folded, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(folded[D : 2 * D], mix[D : 2 * D])


def test_a_starts_uniform_as_in_the_authors_code(bench: Any) -> None:
    p = bench.program.apply(LoRA(at="ffn.*", rank=40)).table.trainable
    for name, inner in (("stack.0.fc", D), ("stack.0.proj", F)):
        a_RI, bound = p[f"{name}.lora_A"].detach(), inner**-0.5
        assert a_RI.shape == (40, inner)
        assert 0.98 * bound < float(a_RI.abs().max()) <= bound
        assert float(a_RI.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert float(a_RI.mean()) == pytest.approx(0, abs=0.05 * bound)
        assert not p[f"{name}.lora_B"].any()


def test_a_starts_gaussian_as_in_the_paper(bench: Any) -> None:
    p = bench.program.apply(LoRA(at="ffn.*", rank=40, init="gaussian")).table.trainable
    for name in ("stack.0.fc", "stack.0.proj"):
        a_RI = p[f"{name}.lora_A"].detach()
        assert float(a_RI.std()) == pytest.approx(1 / 40, rel=0.05)
        assert float(a_RI.abs().max()) > 3 / 40
        assert not p[f"{name}.lora_B"].any()


# model, placement, rank, how many times the traced layers the model has, its published or derived size
SIZES = [
    ("bert-base", "attention.q|attention.v", 8, 1, 294_912),
    ("bert-base", "attention.*|ffn.*", 8, 1, 12 * 8 * (4 * 2 * 768 + 2 * (768 + 3072))),
    ("roberta-large", "attention.q|attention.v", 8, 24, 786_432),
    ("gpt2-medium", "attention.q|attention.v", 4, 24, 393_216),
    ("gpt3", "attention.q|attention.v", 1, 96, 4_718_592),
    ("gpt3", "attention.q|attention.v", 8, 96, 37_748_736),
    ("gpt3", "attention.*", 64, 96, 603_979_776),
    ("llama-7b", "attention.*|ffn.*", 64, 32, 159_907_840),
    ("t5-xl", "attention.*|ffn.*", 4, 24, 9_097_216 - 249_856),
]


@pytest.mark.parametrize(("model", "at", "rank", "times", "size"), SIZES)
def test_published_sizes(real: Any, model: str, at: str, rank: int, times: int, size: int) -> None:
    count = real(model).apply(LoRA(at=at, rank=rank)).count()
    assert count.trainable == count.added
    assert count.trainable * times == size
    assert {(change.rank, change.full) for change in count.changes} == {(rank, False)}


def test_the_three_counts_of_bert_base(real: Any) -> None:
    count = real("bert-base").apply(LoRA(rank=8)).count()
    assert count.total == 109_482_240
    assert count.changed == 24 * 768 * 768
    assert len(count.changes) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora: rank must be at least 1, got 0."),
        ({"rank": -3}, "lora: rank must be at least 1, got -3."),
        ({"dropout": 1.0}, "lora: dropout must lie in [0, 1), got 1.0."),
        ({"dropout": -0.1}, "lora: dropout must lie in [0, 1), got -0.1."),
        (
            {"init": "xavier"},
            'lora: init must be "kaiming" or "gaussian" or "eva" or "pissa" or "olora" or "loftq", got \'xavier\'.',
        ),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pg.RecipeError) as caught:
        LoRA(**options)
    assert str(caught.value) == message


def test_a_rank_larger_than_the_matrix(bench: Any) -> None:
    assert bench.program.apply(LoRA(rank=D)).count().trainable == 2 * 2 * D * D
    with pytest.raises(pg.RecipeError) as caught:
        bench.program.apply(LoRA(rank=D + 1))
    assert str(caught.value) == "lora: rank 49 is larger than 0.attention.q allows: 48 x 48, at most 48."


def test_pissa_starts_from_the_largest_singular_values(bench: Any) -> None:
    tuned = bench.program.apply(LoRA(at="attention.o", rank=3, alpha=6.0, init="pissa"))
    w, p = bench.program.table["stack.0.out.weight"].tensor, tuned.table
    u, s, v = torch.linalg.svd(w)
    best = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    torch.testing.assert_close(2 * p["stack.0.out.lora_B"].tensor @ p["stack.0.out.lora_A"].tensor, best)
    assert not p["stack.0.out.lora_A0"].trainable
    assert torch.equal(p["stack.0.out.lora_A0"].tensor, p["stack.0.out.lora_A"].tensor)
    assert p["stack.0.out.weight"].tensor is w
    assert tuned.count().changes[0].rank == 6
    zoo.randomise(tuned, 0.2)
    change = 2 * (p["stack.0.out.lora_B"].tensor @ p["stack.0.out.lora_A"].tensor) - best
    torch.testing.assert_close(pg.fold(tuned).table["stack.0.out.weight"].tensor, w + change)


def test_olora_starts_from_orthonormal_columns(bench: Any) -> None:
    """Gram and Schmidt by hand: the columns are those of W made orthonormal, and W itself is their combination."""
    tuned = bench.program.apply(LoRA(at="attention.o", rank=3, alpha=6.0, init="olora"))
    w, p = bench.program.table["stack.0.out.weight"].tensor.detach(), tuned.table
    a_RI, b_OR = (p[f"stack.0.out.lora_{one}"].tensor.detach().clone() for one in "AB")
    columns: list[torch.Tensor] = []
    for i in range(3):
        rest = w[:, i] - sum((column * (column @ w[:, i]) for column in columns), torch.zeros(len(w), dtype=w.dtype))
        columns.append(rest / rest.norm())
        assert (columns[i] @ b_OR[:, i]).abs().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(b_OR.T @ w, a_RI)
    torch.testing.assert_close(a_RI.tril(-1), torch.zeros_like(a_RI), rtol=0, atol=1e-12)
    before, after = (program.module().eval()(**bench.inputs)["logits"] for program in (bench.program, tuned))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    zoo.randomise(tuned, 0.2)
    change = 2 * (p["stack.0.out.lora_B"].tensor @ p["stack.0.out.lora_A"].tensor - b_OR @ a_RI)
    torch.testing.assert_close(pg.fold(tuned).table["stack.0.out.weight"].tensor, w + change)


def test_a_rank_stabilised_scale() -> None:
    assert LoRA(rank=16, alpha=8.0).scale == 0.5
    assert LoRA(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


def test_biases_of_the_adapted_projections(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(LoRA(at="attention.o|ffn.up|head", rank=2, bias="lora_only")), 0.2)
    own = {name for name in tuned.table.trainable if "lora" not in name}
    assert own == {"stack.0.out.bias", "stack.0.fc.bias"}
    folded = pg.fold(tuned).table
    assert all(torch.equal(folded[name].tensor, tuned.table[name].tensor) for name in own)
    assert tuned.remove().table.hashes() == bench.program.table.hashes()


def test_biases_where_there_are_none(bench: Any) -> None:
    with pytest.raises(pg.NoMatch, match="none of the 1 sites at head has a bias"):
        bench.program.apply(LoRA(at="head", rank=2, bias="lora_only"))


def test_a_negative_weight_takes_off_what_was_learned(bench: Any) -> None:
    learned = zoo.randomise(bench.program.apply(LoRA(rank=2)), 0.2)
    folded = pg.fold(learned)
    undone = folded.apply(LoRA(rank=2, weight=-1.0))
    with torch.no_grad():
        for name, parameter in undone.table.trainable.items():
            parameter.copy_(learned.table[name].tensor)
    now, before = (p.table["stack.0.mix.weight"].tensor for p in (pg.fold(undone), bench.program))
    torch.testing.assert_close(now, before, rtol=0, atol=1e-14)


@settings(max_examples=60)
@given(
    at=st.sampled_from(
        ["attention.q", "attention.*|ffn.*", "ffn.up&layers(2,6)", 'head|embedding.where(path=".*tok.*")']
    ),
    rank=st.integers(1, 4096),
    alpha=st.floats(allow_nan=False, allow_infinity=False),
    dropout=st.floats(0, 1, exclude_max=True),
    init=st.sampled_from(["kaiming", "gaussian", "pissa", "olora"]),
    rank_stabilised=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    name=st.sampled_from(["", "a", "left_2"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = LoRA(**options)
    assert pg.parse_pass(str(method)) == method
    assert str(pg.parse_pass(str(method))) == str(method)


DIFF = """
    lora{at=attention.v|ffn.up rank=2 alpha=3.0 dropout=0.1 init="kaiming"}
        %0.attention.q+k+v: f32[B, S, 144] = linear(%0.norm.0, @stack.0.mix.weight, @stack.0.mix.bias)
      + %0.attention.v.lora.dropout: f32[B, S, 48] = dropout(%0.norm.0, 0.1, True)
      + %0.attention.v.lora.linear: f32[B, S, 2] = linear(%0.attention.v.lora.dropout, @stack.0.mix.v.lora_A*)
      + %0.attention.v.lora.linear#2: f32[B, S, 48] = linear(%0.attention.v.lora.linear, @stack.0.mix.v.lora_B*)
      + %0.attention.v.lora.mul: f32[B, S, 48] = mul(%0.attention.v.lora.linear#2, 1.5)
      + %0.attention.v.lora.slice: f32[B, S, 48] = slice(%0.attention.q+k+v, -1, 96, 144)
      + %0.attention.v.lora.add: f32[B, S, 48] = add(%0.attention.v.lora.slice, %0.attention.v.lora.mul)
      + %0.attention.v.lora.slice_scatter: f32[B, S, 144] = slice_scatter(%0.attention.q+k+v, %0.attention.v.lora.add, -1, 96, 144)
      - %0.split: (f32[B, S, 48], f32[B, S, 48], f32[B, S, 48]) = split(%0.attention.q+k+v, 48, 2)
      + %0.split: (f32[B, S, 48], f32[B, S, 48], f32[B, S, 48]) = split(%0.attention.v.lora.slice_scatter, 48, 2)
        %0.ffn.up: f32[B, S, 80] = linear(%0.norm.1, @stack.0.fc.weight, @stack.0.fc.bias)
      + %0.ffn.up.lora.dropout: f32[B, S, 48] = dropout(%0.norm.1, 0.1, True)
      + %0.ffn.up.lora.linear: f32[B, S, 2] = linear(%0.ffn.up.lora.dropout, @stack.0.fc.lora_A*)
      + %0.ffn.up.lora.linear#2: f32[B, S, 80] = linear(%0.ffn.up.lora.linear, @stack.0.fc.lora_B*)
      + %0.ffn.up.lora.mul: f32[B, S, 80] = mul(%0.ffn.up.lora.linear#2, 1.5)
      + %0.ffn.up.lora.add: f32[B, S, 80] = add(%0.ffn.up, %0.ffn.up.lora.mul)
      - %0.ffn.hidden: f32[B, S, 80] = gelu(%0.ffn.up)
      + %0.ffn.hidden: f32[B, S, 80] = gelu(%0.ffn.up.lora.add)
    2 sites, +12 nodes, -0 nodes, 2 lines changed, +4 parameters (448 trainable values)
"""  # noqa: E501
COUNT = "trainable 448 (1.6949 %), added 448, changed 6,144, total 26,432; changes: rank 2 in 2 matrices"


def test_text(nano: pg.Program) -> None:
    tuned = nano.apply(LoRA(at="attention.v|ffn.up", rank=2, alpha=3.0, dropout=0.1))
    assert tuned.diff(nano) == dedent(DIFF).lstrip("\n")
    assert str(tuned.count()) == COUNT
    assert tuned.remove().text() == nano.text()


def test_a_projection_that_relative_positions_share_is_not_folded() -> None:
    """DeBERTa v3 runs its relative embeddings through the weights of q and k; the change is for the tokens alone."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=zoo.VOCAB, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=80,
        relative_attention=True, position_buckets=8, share_att_key=True, pos_att_type=["p2c", "c2p"],
    )  # fmt: skip
    base = pg.trace(DebertaV2Model(config).eval(), {"input_ids": torch.randint(3, zoo.VOCAB, (2, 7))})
    shared = r"query_proj.weight is read in 2 places .*, and a change for one would leak into the others"
    with pytest.raises(pg.NoFold, match=shared):
        pg.fold(base.apply(LoRA(at="attention.q", rank=2)))
    assert pg.fold(base.apply(LoRA(at="attention.v", rank=2))).proof
