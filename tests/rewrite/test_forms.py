"""One recipe on every form a projection can take: gathered and grouped experts, experts with biases, several feature
axes, pointwise convolutions, trained norms. Each fold is proved in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass, Rule, train_parameters
from peftgraph.passes import IA3, LoRA


def mixtral_gathered() -> nn.Module:
    model = zoo.build("mixtral")
    model.set_experts_implementation("batched_mm")
    return model


def gpt_oss(implementation: str) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(
        vocab_size=zoo.VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=1,
        rope_parameters=rope,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    model = GptOssForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    return model


def xlnet() -> nn.Module:
    from transformers import XLNetConfig, XLNetModel

    config = XLNetConfig(vocab_size=zoo.VOCAB, d_model=48, n_layer=1, n_head=6, d_inner=80, use_mems_eval=False)
    return XLNetModel(config).eval()


class Convolved(nn.Module):
    """A feed-forward of pointwise convolutions between attention-free residuals: features on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(6, 10, 1), nn.Conv1d(10, 6, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = nn.functional.one_hot(input_ids % 6, 6).to(self.up.weight.dtype).transpose(1, 2)
        return x + self.down(nn.functional.gelu(self.up(x)))


FORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mixtral, gathered": (mixtral_gathered, "attention.*|ffn.*"),
    "gpt_oss, grouped": (lambda: gpt_oss("grouped_mm"), "attention.*|ffn.*"),
    "gpt_oss, gathered": (lambda: gpt_oss("batched_mm"), "attention.*|ffn.*"),
    "xlnet, several axes": (xlnet, "attention.*|ffn.*"),
    "pointwise convolutions": (Convolved, "ffn.*"),
}


@pytest.mark.parametrize("form", FORMS)
def test_lora_and_ia3_fold_in_every_form(form: str) -> None:
    build, at = FORMS[form]
    inputs = zoo.example("bert")
    inputs = inputs if form != "pointwise convolutions" else {"input_ids": inputs["input_ids"]}
    base = pg.trace(build(), inputs)
    scales = "ffn.hidden|ffn.up" if "pointwise" in form else "attention.k|attention.v|ffn.hidden|ffn.up"
    for recipe in ([LoRA(at=at, rank=2)], [IA3(at=scales)], [IA3(at=scales), LoRA(at=at, rank=2)]):
        tuned = base.apply(*recipe)
        fresh, start = (zoo.leaves(p.module().eval()(**inputs)) for p in (tuned, base))
        assert all(torch.equal(a, b) for a, b in zip(fresh, start, strict=True))
        zoo.randomise(tuned)
        moved = zoo.leaves(tuned.module().eval()(**inputs))
        assert not torch.equal(moved[0], start[0])
        proof = pg.fold(tuned).proof
        assert proof is not None
        assert max(probe.error for probe in proof.probes if probe.dtype == "float64") < 1e-12


@dataclass(frozen=True, kw_only=True)
class Norms(Pass):
    """Only the norms train."""

    word = "norms"

    def rules(self) -> list[Rule]:
        return [train_parameters(pg.norm)]


@pytest.mark.parametrize(("name", "vectors"), [("bert", 2 * 5), ("llama", 5)])
def test_norms_train_scale_and_bias(name: str, vectors: int) -> None:
    base = zoo.traced(name)
    tuned = zoo.randomise(base.apply(Norms()))
    assert tuned.count().trainable == tuned.count().changed == vectors * zoo.WIDTH
    folded = pg.fold(tuned)
    for key, parameter in tuned.table.trainable.items():
        assert torch.equal(folded.table[key].tensor, parameter)
        assert not torch.equal(folded.table[key].tensor, base.table[key].tensor)
