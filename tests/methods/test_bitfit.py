"""BitFit: which biases train, their gradients, their published sizes and the text."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import peftgraph as pg
from peftgraph.passes import BitFit

SECOND = 'bias.where(path=".*(query|intermediate).*")'


def test_equation(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(BitFit()), 0.2)
    reference = bench.plain()
    same = {name: p for name, p in reference.named_parameters() if name.endswith("bias")}
    assert len(same) == 7
    for parameter in same.values():
        parameter.requires_grad_(True)
    bench.agree(tuned, reference, same)


def test_the_base_keeps_its_biases(bench: Any) -> None:
    hashes = bench.program.table.hashes()
    tuned = zoo.randomise(bench.program.apply(BitFit()), 0.2)
    assert bench.program.table.hashes() == hashes
    folded = pg.fold(tuned).table
    changed = {name for name, entry in folded.items() if entry.tensor is not bench.program.table[name].tensor}
    assert changed == tuned.table.trainable.keys()
    for name in changed:
        assert torch.equal(folded[name].tensor, tuned.table[name].tensor)
    assert tuned.remove().table.hashes() == hashes


def test_a_fresh_pass_starts_at_the_base(bench: Any) -> None:
    tuned = bench.program.apply(BitFit())
    for name, parameter in tuned.table.trainable.items():
        assert torch.equal(parameter, bench.program.table[name].tensor)
    assert tuned.count().added == 0


def bitfit(layers: int, width: int, inner: int) -> int:
    """L (7d + f) and 2d more: the embedding's norm and the pooler, which belong to no layer."""
    return layers * (7 * width + inner) + 2 * width


def test_published_sizes(real: Any) -> None:
    assert real("bert-base").apply(BitFit()).count().trainable == bitfit(12, 768, 3072) == 102_912
    reduced = real("bert-base").apply(BitFit(at=SECOND)).count().trainable
    assert reduced == 12 * (768 + 3072)

    # one layer of RoBERTa-large, which has the shapes of BERT-large
    one = real("roberta-large").apply(BitFit()).count().trainable
    assert 24 * (one - 2 * 1024) + 2 * 1024 == bitfit(24, 1024, 4096) == 272_384
    assert 24 * real("roberta-large").apply(BitFit(at=SECOND)).count().trainable == 122_880

    # one layer of GPT-3: 3d + d + 4d + d and two norms, and the last norm
    one = real("gpt3").apply(BitFit()).count().trainable
    assert 96 * (one - 12288) + 12288 == 12_988_416


def test_the_pooler_and_the_embeddings_norm_belong_to_no_layer(real: Any) -> None:
    outside = [site.path for site in real("bert-base").sites.select(pg.bias) if site.layer is None]
    assert outside == ["embeddings.LayerNorm.bias", "pooler.dense.bias"]


def test_a_model_without_biases_is_an_error(real: Any) -> None:
    with pytest.raises(pg.NoMatch, match="bias: 0 sites"):
        real("t5-xl").apply(BitFit())


def test_the_smaller_set_by_structure(real: Any) -> None:
    assert real("bert-base").apply(BitFit(at="attention.q|ffn.up")).count().trainable == 12 * (768 + 3072)
    assert 24 * real("roberta-large").apply(BitFit(at="attention.q|ffn.up")).count().trainable == 122_880


def test_one_slice_of_a_fused_bias(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(BitFit(at="attention.q|ffn.up")), 0.2)
    assert set(tuned.table.trainable) == {"stack.0.mix.q.bitfit_d", "stack.0.fc.bias"}
    d_Q = tuned.table["stack.0.mix.q.bitfit_d"].tensor
    reference = bench.plain()
    shift = torch.cat([d_Q.detach(), torch.zeros(2 * zoo.WIDTH, dtype=torch.float64)])
    reference.stack[0].mix.bias.add_(shift)
    reference.stack[0].fc.bias.copy_(tuned.table["stack.0.fc.bias"].tensor)
    ours, theirs = (module.eval()(**bench.inputs)["logits"] for module in (tuned.module(), reference))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    folded = pg.fold(tuned).table
    assert torch.equal(folded["stack.0.mix.bias"].tensor, reference.stack[0].mix.bias)


def test_zero_biases_where_the_model_has_none(real: Any) -> None:
    """T-Few's counts, one layer a stack traced: 24 of each, and the last norm of each stack."""

    def whole(at: str) -> int:
        one = real("t5-xl").apply(BitFit(at=at, zero=True, norms=True)).count().trainable
        return 24 * (one - 2 * 2048) + 2 * 2048

    assert whole("attention.*|ffn.up|ffn.gate") == 1_331_200  # published as 1.3M: the pattern misses wo
    assert whole("attention.*|ffn.*") == 1_429_504


def test_added_biases_start_at_zero_and_do_not_fold() -> None:
    base, inputs = zoo.traced("t5", dtype=torch.float64), zoo.example("t5")
    tuned = base.apply(BitFit(at="attention.*|ffn.*", zero=True))
    ours, theirs = (zoo.leaves(program.module().eval()(**inputs))[0] for program in (tuned, base))
    assert torch.equal(ours, theirs)
    moved = zoo.leaves(zoo.randomise(tuned).module().eval()(**inputs))[0]
    assert not torch.equal(moved, theirs)
    with pytest.raises(pg.NoFold, match="there is no bias to fold it into"):
        pg.fold(tuned)
    assert tuned.remove().text() == base.text()


def test_equation_of_an_added_bias(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(BitFit(at="head", zero=True)), 0.2)
    reference = bench.plain()
    head = torch.nn.Linear(zoo.WIDTH, zoo.VOCAB, dtype=torch.float64)
    head.weight = reference.vocab.weight
    reference.vocab = head
    bench.agree(tuned, reference, {"vocab.bitfit_d": head.bias})


def test_projections_without_biases_are_an_error(real: Any) -> None:
    with pytest.raises(pg.NoMatch, match=r"none of the 2 sites at attention\.q\|attention\.v has a bias"):
        real("llama-7b").apply(BitFit(at="attention.q|attention.v"))


def test_norms_and_the_head(bench: Any) -> None:
    plain = set(bench.program.apply(BitFit()).table.trainable)
    more = set(bench.program.apply(BitFit(norms=True, head=True)).table.trainable)
    assert more - plain == {"stack.0.n1.weight", "stack.0.n2.weight", "last.weight", "vocab.weight"}


def test_two_that_train_the_same_bias_conflict(bench: Any) -> None:
    with pytest.raises(pg.Conflict, match=r"both train stack\.0\.n1\.bias"):
        bench.program.apply(BitFit(), BitFit(name="again"))


@settings(max_examples=20)
@given(
    at=st.sampled_from(["bias", "bias&layers(1,3)", SECOND]),
    zero=st.booleans(),
    norms=st.booleans(),
    head=st.booleans(),
    name=st.sampled_from(["", "a", "left_2"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = BitFit(**options)
    assert pg.parse_pass(str(method)) == method
    assert str(pg.parse_pass(str(method))) == str(method)


DIFF = """
    bitfit{at=bias}
      - %0.norm.0: f32[B, S, 48] = layer_norm(%0.add, [48], @stack.0.n1.weight, @stack.0.n1.bias, 1e-05, False)
      + %0.norm.0: f32[B, S, 48] = layer_norm(%0.add, [48], @stack.0.n1.weight, @stack.0.n1.bias*, 1e-05, False)
      - %0.attention.q+k+v: f32[B, S, 144] = linear(%0.norm.0, @stack.0.mix.weight, @stack.0.mix.bias)
      + %0.attention.q+k+v: f32[B, S, 144] = linear(%0.norm.0, @stack.0.mix.weight, @stack.0.mix.bias*)
      - %0.attention.o: f32[B, S, 48] = linear(%0.reshape, @stack.0.out.weight, @stack.0.out.bias)
      + %0.attention.o: f32[B, S, 48] = linear(%0.reshape, @stack.0.out.weight, @stack.0.out.bias*)
      - %0.norm.1: f32[B, S, 48] = layer_norm(%0.add_2, [48], @stack.0.n2.weight, @stack.0.n2.bias, 1e-05, False)
      + %0.norm.1: f32[B, S, 48] = layer_norm(%0.add_2, [48], @stack.0.n2.weight, @stack.0.n2.bias*, 1e-05, False)
      - %0.ffn.up: f32[B, S, 80] = linear(%0.norm.1, @stack.0.fc.weight, @stack.0.fc.bias)
      + %0.ffn.up: f32[B, S, 80] = linear(%0.norm.1, @stack.0.fc.weight, @stack.0.fc.bias*)
      - %0.ffn.down: f32[B, S, 48] = linear(%0.ffn.hidden, @stack.0.proj.weight, @stack.0.proj.bias)
      + %0.ffn.down: f32[B, S, 48] = linear(%0.ffn.hidden, @stack.0.proj.weight, @stack.0.proj.bias*)
      - %norm: f32[B, S, 48] = layer_norm(%0.add_3, [48], @last.weight, @last.bias, 1e-05, False)
      + %norm: f32[B, S, 48] = layer_norm(%0.add_3, [48], @last.weight, @last.bias*, 1e-05, False)
    7 sites, +0 nodes, -0 nodes, 7 lines changed, +7 parameters (464 trainable values)
"""
COUNT = "trainable 464 (1.7554 %), added 0, changed 464, total 26,432; changes: 7 vectors"


def test_text(nano: pg.Program) -> None:
    tuned = nano.apply(BitFit())
    assert tuned.diff(nano) == dedent(DIFF).lstrip("\n")
    assert str(tuned.count()) == COUNT
    assert tuned.remove().text() == nano.text()
