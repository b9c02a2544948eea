"""Real families, checked by hand. Module paths are the truth here, and only here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from peftgraph.sites import Columns, Site, Sites

Find = Callable[..., Sites]
D = 48


def paths(sites: Sites, selector: str) -> list[str]:
    return [site.path for site in sites.select(selector)]


def columns(sites: Sites, selector: str) -> list[Columns | None]:
    return [site.columns for site in sites.select(selector)]


def one(sites: Sites, selector: str) -> Site:
    (site,) = sites.require(selector)
    return site


def interleaved(part: int) -> Columns:
    """GPT-NeoX: each head's q, k, v side by side, 6 heads of 8."""
    return Columns(tuple((24 * head + 8 * part, 24 * head + 8 * part + 8) for head in range(6)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
class TestEveryRole:
    def test_bert(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("BertModel", attention)
        for layer in (0, 1):
            at = f"&layers({layer})"
            prefix = f"encoder.layer.{layer}"
            assert paths(sites, "attention.q" + at) == [f"{prefix}.attention.self.query"]
            assert paths(sites, "attention.k" + at) == [f"{prefix}.attention.self.key"]
            assert paths(sites, "attention.v" + at) == [f"{prefix}.attention.self.value"]
            assert paths(sites, "attention.o" + at) == [f"{prefix}.attention.output.dense"]
            assert paths(sites, "ffn.up" + at) == [f"{prefix}.intermediate.dense"]
            assert paths(sites, "ffn.down" + at) == [f"{prefix}.output.dense"]
            norms = [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
            assert paths(sites, "norm" + at) == norms
            assert one(sites, "block" + at).path == prefix
        assert {site.layout for site in sites.select("attention|ffn")} == {"post"}
        assert all("normed" in site.ports for site in sites.select("attention|ffn"))
        assert paths(sites, "head") == ["pooler.dense"]
        assert paths(sites, "embedding") == ["embeddings.word_embeddings"]
        assert len(sites.select("bias")) == 2 * 8 + 2

    def test_llama(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("LlamaForCausalLM", attention)
        for role, name, heads in (("q", "q_proj", 6), ("k", "k_proj", 2), ("v", "v_proj", 2)):
            found = sites.select(f"attention.{role}")
            assert [site.path for site in found] == [f"model.layers.{i}.self_attn.{name}" for i in (0, 1)]
            assert {(site.heads, site.head_dim, site.columns) for site in found} == {(heads, 8, None)}
        assert paths(sites, "ffn.gate") == [f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)]
        assert paths(sites, "ffn.up") == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
        assert paths(sites, "ffn.down") == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
        assert paths(sites, "norm&~layers(0,2)") == ["model.norm"]
        assert paths(sites, "head") == ["lm_head"]
        assert {site.layout for site in sites.select("attention|ffn")} == {"pre"}
        assert not sites.select("bias")

    def test_gpt2(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("GPT2LMHeadModel", attention)
        for i, role in enumerate("qkv"):
            site = one(sites, f"attention.{role}&layers(1)")
            assert site.path == "transformer.h.1.attn.c_attn"
            assert site.columns == Columns(((D * i, D * i + D),))
            assert site.weight is not None
            assert site.weight.transposed
            assert site.weight.window == site.columns
            assert site.bias is not None
            assert (site.bias.parameter, site.bias.window) == (
                "transformer.h.1.attn.c_attn.bias",
                site.columns,
            )
            assert site.shape == (D, D)
        assert paths(sites, "attention.o") == [f"transformer.h.{i}.attn.c_proj" for i in (0, 1)]
        assert paths(sites, "ffn.up") == [f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)]

    def test_neox(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("GPTNeoXForCausalLM", attention)
        for part, role in enumerate("qkv"):
            assert columns(sites, f"attention.{role}") == [interleaved(part)] * 2
        assert {site.parallel for site in sites.select("attention|ffn")} == {True}
        outputs = [site.ports["output"] for site in sites.select("(attention|ffn)&layers(0)")]
        assert len(set(outputs)) == 2

    def test_t5(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("T5ForConditionalGeneration", attention)
        for layer in (0, 1):
            at = f"&layers({layer})"
            cross = f"decoder.block.{layer}.layer.1.EncDecAttention."
            own = f"decoder.block.{layer}.layer.0.SelfAttention."
            assert paths(sites, 'attention.*&kind("cross")' + at) == [cross + name for name in "qkvo"]
            assert paths(sites, 'attention.*&kind("self")&stack("decoder")' + at) == [own + name for name in "qkvo"]
        assert Counter(site.stack for site in sites.select("block")) == {"encoder": 2, "decoder": 2}
        assert one(sites, 'attention.q&kind("cross")&layers(0)').id == "decoder.0.cross.attention.q"
        assert len(sites.select("norm")) == 4 + 6 + 2
        assert len(sites.select("ffn.up")) == 4
        assert not sites.select("bias")

    def test_bart(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("BartForConditionalGeneration", attention)
        expected = [f"model.decoder.layers.{i}.encoder_attn.v_proj" for i in (0, 1)]
        assert paths(sites, 'attention.v&kind("cross")') == expected
        assert paths(sites, 'ffn.down&stack("encoder")') == [f"model.encoder.layers.{i}.fc2" for i in (0, 1)]
        memory = {site.ports["memory"] for site in sites.select('attention&kind("cross")')}
        assert len(memory) == 1

    def test_vit(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("ViTForImageClassification", attention)
        assert paths(sites, "head") == ["classifier"]
        assert len(sites.select("attention.*")) == 8
        assert len(sites.select("ffn.*")) == 4

    def test_mixtral(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("MixtralForCausalLM", attention)
        gate, up, down = (one(sites, f"ffn.{role}&layers(0)") for role in ("gate", "up", "down"))
        assert gate.path == up.path == "model.layers.0.mlp.experts.gate_up_proj"
        assert (gate.columns, up.columns) == (Columns(((0, 80),)), Columns(((80, 160),)))
        assert gate.weight is not None
        assert (gate.weight.experts, gate.weight.transposed, gate.shape) == (4, False, (80, D))
        assert down.path == "model.layers.0.mlp.experts.down_proj"
        assert "offsets" in down.ports
        assert paths(sites, "router") == [f"model.layers.{i}.mlp.gate" for i in (0, 1)]

    def test_phi3(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("Phi3ForCausalLM", attention)
        at = "&layers(0)"
        found = [one(sites, f"attention.{role}{at}").columns for role in "qkv"]
        assert found == [Columns(((0, 48),)), Columns(((48, 64),)), Columns(((64, 80),))]
        assert one(sites, "ffn.gate" + at).columns == Columns(((0, 80),))
        assert one(sites, "ffn.up" + at).columns == Columns(((80, 160),))

    def test_falcon_multi_query(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("FalconForCausalLM", attention)
        found = [one(sites, f"attention.{role}&layers(0)") for role in "qkv"]
        assert [site.columns for site in found] == [
            Columns(((0, 48),)),
            Columns(((48, 56),)),
            Columns(((56, 64),)),
        ]
        assert [site.heads for site in found] == [6, 1, 1]

    def test_cohere_adds_two_branches_to_one_skip(self, sites_of: Find, attention: str) -> None:
        sites = sites_of("CohereForCausalLM", attention)
        assert {site.parallel for site in sites.select("attention|ffn")} == {True}
        assert sites.layers == 2


def test_albert_shares_parameters_between_sites(sites_of: Find) -> None:
    sites = sites_of("AlbertModel", "sdpa")
    found = sites.select("attention.q")
    assert [site.layer for site in found] == [0, 1]
    assert len({site.weight for site in found}) == 1
    assert len({site.id for site in found}) == 2


def test_gemma2_is_a_sandwich(sites_of: Find) -> None:
    sites = sites_of("Gemma2ForCausalLM")
    assert {site.layout for site in sites.select("attention|ffn")} == {"sandwich"}


def test_experts_by_gathered_weights(sites_of: Find) -> None:
    sites = sites_of("MixtralForCausalLM", "sdpa", experts_implementation="batched_mm")
    gate, up = one(sites, "ffn.gate&layers(1)"), one(sites, "ffn.up&layers(1)")
    assert (gate.columns, up.columns) == (Columns(((0, 80),)), Columns(((80, 160),)))
    assert gate.weight is not None
    assert gate.weight.experts == 4
    assert "chosen" in gate.ports


def test_ids_are_unique(sites_of: Find) -> None:
    for name in ("BertModel", "T5ForConditionalGeneration", "MixtralForCausalLM"):
        ids = [site.id for site in sites_of(name)]
        assert len(ids) == len(set(ids))
