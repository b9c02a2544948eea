"""Folding: what is refused and why, rounding, ties, shared weights, and a proof that can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import zoo
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import Builder, Match, Multiply, ParameterValue, Params, Pass, Rule
from peftgraph.authoring.modules import init
from peftgraph.folding.proof import ProofError
from peftgraph.passes import IA3, BitFit, LoRA, SerialAdapter


@dataclass(frozen=True, kw_only=True)
class Gate(Pass):
    """y -> y * sigmoid(y): a rewrite that cannot fold."""

    word = "gate"
    at: pg.Selector = pg.attention.q

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, join=Multiply(), fold="the gate depends on the input")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        weight = m.along_features(op, op.param("g", (m.features,), init.zeros))
        if m.site.columns is not None:
            return op.activation("sigmoid", weight)
        return op.activation("sigmoid", op.add(m.output, weight))


@dataclass(frozen=True, kw_only=True)
class Reader(Pass):
    """down(h) -> down(h) + V h: reads the hidden value and cannot fold."""

    word = "reader"
    at: pg.Selector = pg.ffn.down

    def rules(self) -> list[Rule]:
        return [Rule(at=self.at, delta=self.delta, fold="kept apart on purpose")]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        return op.linear(m.input, op.param("v", m.shape, init.zeros))


@dataclass(frozen=True, kw_only=True)
class WrongScale(LoRA):
    """A LoRA whose fold forgets half of its scale."""

    word = "wrong"

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        return {m.weight: m.weight.value + 0.5 * self.scale * (p.lora_B @ p.lora_A)}


@dataclass(frozen=True, kw_only=True)
class Leaky(LoRA):
    """A LoRA whose fold writes into the bias as well, which its own graph does not do."""

    word = "leaky"

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        assert m.bias is not None
        return {m.weight: m.weight.value + self.scale * (p.lora_B @ p.lora_A), m.bias: m.bias.value + 1e-3}


def test_the_evidence_can_be_read() -> None:
    program = zoo.randomise(zoo.traced("bert").apply(LoRA(rank=2), IA3(), BitFit()))
    proof = pg.fold(program).proof
    assert proof is not None
    assert proof.text_equal is True
    assert {name.rpartition(".")[2] for name in proof.changed} == {"weight", "bias"}
    assert [probe.dtype for probe in proof.probes] == ["float64", "float32"] * 2
    assert all(probe.error <= probe.bound for probe in proof.probes)
    assert "equal to the base's text" in str(proof)
    assert "relative difference" in str(proof)


@pytest.mark.parametrize("method", [WrongScale(rank=2), Leaky(rank=2)], ids=str)
def test_a_wrong_fold_does_not_pass_the_proof(method: LoRA) -> None:
    program = zoo.randomise(zoo.traced("bert").apply(method))
    with pytest.raises(ProofError, match="the folded weights and the passes differ by"):
        pg.fold(program)


def test_gpt2_folds_q_and_v_and_leaves_k_bit_for_bit() -> None:
    base = zoo.traced("gpt2")
    folded = pg.fold(zoo.randomise(base.apply(LoRA(at="attention.q|attention.v", rank=2))))
    for layer in range(zoo.LAYERS):
        name = f"transformer.h.{layer}.attn.c_attn.weight"  # stored (in, 3 * out)
        before, after = base.table[name].tensor, folded.table[name].tensor
        q, k, v = (slice(i * zoo.WIDTH, (i + 1) * zoo.WIDTH) for i in range(3))
        assert torch.equal(before[:, k], after[:, k])
        assert (before[:, q] != after[:, q]).any()
        assert (before[:, v] != after[:, v]).any()
        assert torch.equal(
            base.table[f"transformer.h.{layer}.attn.c_attn.bias"].tensor,
            folded.table[f"transformer.h.{layer}.attn.c_attn.bias"].tensor,
        )


def test_bfloat16_is_rounded_once() -> None:
    base = zoo.traced("bert", "sdpa", torch.bfloat16)
    program = zoo.randomise(base.apply(LoRA(at="attention.k", rank=4), IA3(at="attention.k")))
    folded = pg.fold(program)
    name = "encoder.layer.0.attention.self.key"
    weight, table = base.table[f"{name}.weight"].tensor.float(), program.table
    a, b, scale = (table[f"{name}.{part}"].tensor.float() for part in ("lora_A", "lora_B", "ia3_l"))
    once = ((weight + 4.0 * b @ a) * scale.unsqueeze(-1)).to(torch.bfloat16)
    twice = ((weight + 4.0 * b @ a).to(torch.bfloat16).float() * scale.unsqueeze(-1)).to(torch.bfloat16)
    assert torch.equal(folded.table[f"{name}.weight"].tensor, once)
    assert not torch.equal(once, twice)


def test_the_base_and_the_tuned_program_keep_their_weights() -> None:
    base = zoo.traced("nano")
    program = zoo.randomise(base.apply(LoRA(rank=2), BitFit()))
    before = base.table.hashes(), program.table.hashes()
    folded = pg.fold(program)
    assert (base.table.hashes(), program.table.hashes()) == before
    assert folded.table.hashes() != before[0]


def test_training_on_does_not_move_what_is_folded() -> None:
    program = zoo.randomise(zoo.traced("nano").apply(BitFit(), LoRA(rank=2)))
    folded = pg.fold(program)
    hashes = folded.table.hashes()
    zoo.randomise(program)
    assert folded.table.hashes() == hashes


def test_training_a_module_is_seen_by_fold() -> None:
    base = zoo.traced("nano")
    program = base.apply(LoRA(rank=2))
    net = program.module().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert pg.fold(program).table["stack.0.mix.weight"].tensor.dtype == torch.float32
    assert pg.fold(program).table.hashes() != base.table.hashes()


class TestTies:
    def test_a_tied_head_is_refused(self) -> None:
        program = zoo.randomise(zoo.traced("llama").apply(LoRA(at="head", rank=2)))
        with pytest.raises(
            pg.NoFold, match=r"head: lora: lm_head.weight is tied to model.embed_tokens.weight.*untie=True"
        ):
            pg.fold(program)

    def test_untie_gives_the_head_a_tensor_of_its_own(self) -> None:
        base = zoo.traced("llama")
        program = zoo.randomise(base.apply(LoRA(at="head", rank=2)))
        folded = pg.fold(program, untie=True)
        assert folded.proof is not None
        assert folded.proof.split == ("lm_head.weight",)
        assert folded.table["model.embed_tokens.weight"].tensor is base.table["model.embed_tokens.weight"].tensor
        assert not folded.table.ties()

    def test_a_tied_embedding_is_refused_too(self) -> None:
        program = zoo.randomise(zoo.traced("llama").apply(LoRA(at="embedding", rank=2)))
        with pytest.raises(pg.NoFold, match="is tied to lm_head.weight"):
            pg.fold(program)
        assert pg.fold(program, untie=True).text() == zoo.traced("llama").text()

    def test_other_weights_of_a_tied_model_fold_and_keep_the_tie(self) -> None:
        folded = pg.fold(zoo.randomise(zoo.traced("llama").apply(LoRA(rank=2))))
        assert folded.table.ties() == zoo.traced("llama").table.ties() != ()


@pytest.fixture(scope="module")
def albert() -> pg.Program:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(vocab_size=61, embedding_size=24, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                          num_attention_heads=6, max_position_embeddings=64)  # fmt: skip
    return pg.trace(AlbertModel(config).eval(), zoo.example("bert"))


class TestShared:
    def test_one_weight_at_many_sites_is_refused(self, albert: pg.Program) -> None:
        with pytest.raises(pg.NoFold, match="is read in 2 places .* a change for one would leak into the others"):
            pg.fold(zoo.randomise(albert.apply(LoRA(at="attention.q&layers(0)", rank=2))))

    def test_shared_biases_train_once(self, albert: pg.Program) -> None:
        program = zoo.randomise(albert.apply(BitFit()))
        assert pg.fold(program).text() == albert.text()


class TestOrder:
    def test_what_stands_on_an_unfolded_edit_is_refused(self) -> None:
        program = zoo.randomise(zoo.traced("bert").apply(Gate(), LoRA(at="attention.q|attention.v", rank=2)))
        with pytest.raises(pg.NoFold, match="0.attention.q: lora: it stands on gate, which is not folded"):
            pg.fold(program)
        rest = pg.fold(program, partial=True)
        assert {edit.site for edit in rest.edits} == {"0.attention.q", "1.attention.q"}

    def test_below_an_unfolded_edit_it_folds(self) -> None:
        program = zoo.randomise(zoo.traced("bert").apply(LoRA(at="attention.q", rank=2), Gate()))
        rest = pg.fold(program, partial=True)
        assert [applied.method.word for applied in rest.history] == ["gate"]
        assert rest.proof is not None
        assert rest.proof.text_equal is None

    def test_other_columns_of_a_fused_weight_do_not_stand_in_the_way(self) -> None:
        program = zoo.randomise(zoo.traced("gpt2").apply(Gate(at="attention.q"), LoRA(at="attention.v", rank=2)))
        rest = pg.fold(program, partial=True)
        assert [applied.method.word for applied in rest.history] == ["gate"]

    def test_a_scaled_hidden_value_that_someone_else_reads_is_refused(self) -> None:
        program = zoo.randomise(zoo.traced("bert").apply(IA3(at="ffn.hidden"), Reader()))
        with pytest.raises(
            pg.NoFold, match=r"0.ffn.hidden: ia3: the scaled value is also read by %0.ffn.down.reader.linear"
        ):
            pg.fold(program)

    def test_a_scaled_hidden_value_that_lora_reads_folds(self) -> None:
        program = zoo.randomise(zoo.traced("bert").apply(IA3(at="ffn.hidden"), LoRA(at="ffn.down", rank=2)))
        assert pg.fold(program).text() == zoo.traced("bert").text()


def test_partial_keeps_what_is_left_trainable() -> None:
    program = zoo.randomise(zoo.traced("nano").apply(SerialAdapter(width=2), LoRA(rank=2)))
    rest = pg.fold(program, partial=True)
    assert rest.table.trainable.keys() == {name for name in program.table.trainable if "serial" in name}
    assert rest.proof is not None
    assert len(rest.proof.left) == 2 * zoo.LAYERS


def test_nothing_to_fold_is_a_fold() -> None:
    base = zoo.traced("nano")
    assert pg.fold(base).text() == base.text()


def test_meta_programs_fold_without_probes() -> None:
    with torch.device("meta"):
        model = zoo.Nano()
    folded = pg.fold(pg.trace(model, zoo.example("nano")).apply(LoRA(rank=2)))
    assert folded.proof is not None
    assert folded.proof.probes == ()
    assert folded.proof.rounding is None
