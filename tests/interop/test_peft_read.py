"""Directories that peft wrote are read: the same outputs as peft's own model, or an error that names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft_directories as pd
import pytest
import zoo

import peftgraph as pg

LORA = {"r": 3, "lora_alpha": 5}
BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]


def lora(name: str, targets: Any, spec: str, **more: Any) -> tuple[str, peft.PeftConfig, str]:
    return name, peft.LoraConfig(target_modules=targets, **(LORA | more)), spec


RANKS = {"rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 4}, "alpha_pattern": {"q_proj": 7}}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "two": lora("llama", ["q_proj", "v_proj"], "lora{at=attention.q|attention.v rank=3 alpha=5.0 "),
    "all": lora(
        "llama", "all-linear", "lora{at=attention.q|attention.k|attention.v|attention.o|ffn.up|ffn.gate|ffn.down"
    ),
    "regex": lora("bert", r".*layer\.1\..*(query|value)", "lora{at=(attention.q|attention.v).where(path="),
    "layers": lora("llama", ["q_proj"], "lora{at=attention.q.where(path=", layers_to_transform=[1]),
    "excluded": lora("llama", ["q_proj", "v_proj"], "", exclude_modules=["layers.0.self_attn.v_proj"]),
    "ranks": lora("llama", ["q_proj", "v_proj"], "", **RANKS),
    "stabilised": lora("llama", ["q_proj", "v_proj"], "rank_stabilised=true", use_rslora=True),
    "gaussian": lora("llama", ["q_proj"], 'init="gaussian"', init_lora_weights="gaussian"),
    "dropout": lora("llama", ["q_proj"], "dropout=0.25", lora_dropout=0.25),
    "embedding": lora("llama", ["embed_tokens", "q_proj"], "at=attention.q|embedding"),
    "tied-head": lora("llama", ["lm_head"], "lora{at=head"),
    "conv1d": lora("gpt2", ["c_attn", "c_proj", "c_fc"], "attention.q|attention.k|attention.v|attention.o"),
    "interleaved": lora("gpt_neox", ["query_key_value", "dense"], ""),
    "fused": lora("nano", ["mix", "fc"], "lora{at=attention.q|attention.k|attention.v|ffn.up"),
    "many-queries": lora("falcon", ["query_key_value"], "rank=8", r=12),
    "seq2seq": lora("t5", ["q", "v", "wo"], ""),
    "router": lora("mixtral", ["gate", "q_proj"], "router"),
    "experts": lora("mixtral", [], "ffn.up|ffn.gate|ffn.down", target_parameters=EXPERTS),
    "experts-and-more": lora("mixtral", ["v_proj"], "", target_parameters=EXPERTS, rank_pattern={"down_proj": 2}),
    "parameter": lora("llama", [], "lora{at=attention.o", target_parameters=["self_attn.o_proj.weight"]),
    "bias-all": lora("bert", ["query"], "freeze{at=bias", bias="all"),
    "bias-its-own": lora("gpt2", ["c_attn"], "freeze{at=bias.where(path=", bias="lora_only"),
    "dora": lora("bert", BERT, "dora{at=", use_dora=True),
    "dora-fused": lora("gpt2", ["c_attn", "c_fc"], "dora{at=", use_dora=True),
    "dora-bias": lora("gpt_neox", ["query_key_value"], "freeze{", use_dora=True, bias="all"),
    "head": lora("vit", ["q_proj"], "freeze{at=head", modules_to_save=["classifier"]),
    "norm-and-head": lora(
        "vit", ["q_proj"], "freeze{at=(norm|head).where(path=", modules_to_save=["classifier", "layernorm"]
    ),
    "pissa": lora("llama", ["q_proj"], 'init="pissa"', init_lora_weights="pissa"),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_pefts(case: str, tmp_path: Path) -> None:
    name, config, spec = CASES[case]
    theirs = pd.wrapped(name, config)
    loaded = zoo.traced(name).load_adapter(pd.saved(theirs, tmp_path))
    inputs = zoo.example(name)
    ours, wanted = pd.asked(loaded.module(), inputs), pd.asked(theirs, inputs)
    assert pd.difference(ours, wanted) < 1e-6
    assert pd.difference(ours, pd.asked(zoo.build(name), inputs)) > 1e-3
    assert spec in str(loaded.recipe)
    assert pg.parse_selector(str(loaded.history[0].method.at)) == loaded.history[0].method.at


SCALED = {
    "llama": ("llama", None, None, "ia3{at=attention.k|attention.v|ffn.hidden}", None),
    "t5": ("t5", None, None, "ia3{at=attention.k|attention.v|ffn.hidden}", None),
    "bert": ("bert", None, None, 'ia3{at=attention.o side="input"}', "scales the input of attention.o: it is loaded"),
    "gpt2": ("gpt2", None, None, "at=attention.q|attention.k|attention.v|ffn.hidden", "the output of attention.q:"),
    "opt": ("vit", ["q_proj", "k_proj", "fc1"], ["fc1"], 'ffn.up side="input"', "attention.q, the input of ffn.up, no"),
    "gated": ("llama", ["k_proj", "v_proj", "up_proj"], [], "attention.k|attention.v|ffn.up}", None),
}


@pytest.mark.parametrize("case", SCALED)
def test_scales_stand_where_they_were_trained(case: str, tmp_path: Path) -> None:
    name, targets, inside, spec, warning = SCALED[case]
    theirs = pd.wrapped(name, peft.IA3Config(target_modules=targets, feedforward_modules=inside))
    directory = pd.saved(theirs, tmp_path)
    if warning is None:
        loaded = zoo.traced(name).load_adapter(directory)
    else:
        with pytest.warns(UserWarning, match=warning) as caught:
            loaded = zoo.traced(name).load_adapter(directory)
        assert caught[0].filename == __file__
    inputs = zoo.example(name)
    ours, wanted = pd.asked(loaded.module(), inputs), pd.asked(theirs, inputs)
    assert pd.difference(ours, wanted) < 1e-6
    assert spec in str(loaded.recipe)
    assert pd.difference(pd.asked(pg.fold(loaded).module(), inputs), wanted) < 1e-5
