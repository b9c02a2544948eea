"""Directories that peft wrote are read: the same outputs as peft's own model, or an error that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import peft_directories as pd
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

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
    "start-and-dropout": lora(
        "llama", ["q_proj"], 'dropout=0.25 init="gaussian"', init_lora_weights="gaussian", lora_dropout=0.25
    ),
    "embedding": lora("llama", ["embed_tokens", "q_proj"], "at=attention.q|embedding"),
    "tied-head": lora("llama", ["lm_head"], "lora{at=head"),
    "conv1d": lora("gpt2", ["c_attn", "c_proj", "c_fc"], "attention.q|attention.k|attention.v|attention.o"),
    "interleaved": lora("gpt_neox", ["query_key_value", "dense"], ""),
    "fused": lora("nano", ["mix", "fc"], "lora{at=attention.q|attention.k|attention.v|ffn.up"),
    "rank-above-a-side": lora("vit", ["classifier", "q_proj"], "lora{at=head rank=5", r=8),
    "seq2seq": lora("t5", ["q", "v", "wo"], ""),
    "router": lora("mixtral", ["gate", "q_proj"], "router"),
    "experts": lora("mixtral", [], "ffn.up|ffn.gate|ffn.down", target_parameters=EXPERTS),
    "experts-and-more": lora("mixtral", ["v_proj"], "", target_parameters=EXPERTS, rank_pattern={"down_proj": 2}),
    "parameter": lora("llama", [], "lora{at=attention.o", target_parameters=["self_attn.o_proj.weight"]),
    "bias-all": lora("bert", ["query"], "train{at=bias", bias="all"),
    "bias-its-own": lora("gpt2", ["c_attn"], "train{at=bias.where(path=", bias="lora_only"),
    "bias-of-b": lora("bert", ["query", "output.dense"], "train{at=", lora_bias=True, alpha_pattern={"query": 7}),
    "bias-of-b-fused": lora("gpt2", ["c_attn"], "train{at=bias.where(path=", lora_bias=True, bias="lora_only"),
    "bias-of-b-alone": lora(
        "llama", ["q_proj", "v_proj"], "bitfit{at=attention.q|attention.v zero=true", lora_bias=True
    ),
    "bias-of-b-stabilised": lora("gpt_neox", ["query_key_value"], "train{", lora_bias=True, use_rslora=True),
    "dora": lora("bert", BERT, "dora{at=", use_dora=True),
    "dora-embedding": lora("llama", ["embed_tokens", "v_proj"], "dora{at=attention.v|embedding", use_dora=True),
    "dora-fused": lora("gpt2", ["c_attn", "c_fc"], "dora{at=", use_dora=True),
    "dora-bias": lora("gpt_neox", ["query_key_value"], "train{", use_dora=True, bias="all"),
    "head": lora("vit", ["q_proj"], "train{at=head", modules_to_save=["classifier"]),
    "norm-and-head": lora(
        "vit", ["q_proj"], "train{at=(head|norm).where(path=", modules_to_save=["classifier", "layernorm"]
    ),
    "pissa": lora("llama", ["q_proj"], 'init="pissa"', init_lora_weights="pissa"),
    "olora": lora("llama", ["q_proj"], 'init="olora"', init_lora_weights="olora"),
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


# what is refused


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA)
    return pd.saved(pd.wrapped("llama", config), tmp_path / "adapter")


def refused(directory: Path, words: str, name: str = "llama") -> None:
    program = zoo.traced(name)
    text, hashes = program.text(), program.table.hashes()
    with pytest.raises(pg.AdapterError, match=words):
        program.load_adapter(directory)
    assert program.text() == text
    assert program.table.hashes() == hashes


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"peft_type": "VERA"}, "has peft_type='VERA'; those that are read are LORA"),
    "no-method": ({"peft_type": None}, "has peft_type=''"),
    "kind": ({"r": "3"}, "is damaged: r cannot be '3'"),
    "truth": ({"lora_alpha": True}, "is damaged: lora_alpha cannot be True"),
    "pattern": ({"rank_pattern": {"q_proj": "x"}}, "is damaged: q_proj cannot be 'x'"),
    "regex": ({"target_modules": "(q_proj"}, r"is damaged: .* is no regular expression: missing \)"),
    "rank": ({"r": 4}, "have rank 3, adapter_config.json says 4"),
    "corda": ({"init_lora_weights": "corda"}, "whose start moves the base's own weights"),
    "pissa-dora": ({"init_lora_weights": "pissa", "use_dora": True}, "start moves the weights that its DoRA norms"),
    "olora-conv1d": ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "takes off the transpose of what it adds"),
    "unheard-of": ({"use_magic": {"a": 1}}, "has use_magic={'a': 1}, which no pass does"),
    "fewer-targets": ({"target_modules": ["q_proj"]}, r"v_proj has tensors, but target_modules does not select it"),
    "more-targets": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "target_modules selects model.layers.0.self_"
                     "attn.k_proj, of which the file has no tensors"),
    "dora": ({"use_dora": True}, "has no dora_m, but lora_A, lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_say_something_else(case: str, directory: Path) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OPTIONS[case][0]))
    refused(directory, OPTIONS[case][1])


def stack(tensors: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    """A damaged set of tensors."""
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if change == "missing":
        tensors.pop(first)
    elif change == "shape":
        tensors[first] = torch.ones(3, 47)
    elif change == "integers":
        tensors[first] = torch.ones(3, 48, dtype=torch.int8)
    elif change == "elsewhere":
        tensors = {key.replace("self_attn", "other"): value for key, value in tensors.items()}
    else:
        tensors[f"base_model.model.{change}"] = torch.ones(3)
    return tensors


DAMAGE = {
    "missing": "q_proj has no lora_A, but lora_B",
    "shape": r"lora_A has shape \(3, 47\), the recipe makes \(3, 48\)",
    "integers": "holds torch.int8, which cannot train",
    "elsewhere": "target_modules selects model.layers.0.self_attn.q_proj, of which the file has no tensors",
    "nothing.weight": "holds nothing.weight, which this LlamaForCausalLM does not have",
    "model.norm.weight": r"model.norm.weight has shape \(3,\), this LlamaForCausalLM has \(48,\)",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors(case: str, directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(stack(load_file(path), case), path)
    refused(directory, DAMAGE[case])


def test_files_that_are_missing_or_no_safetensors(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(b"garbage!")
    refused(directory, "adapter_model.safetensors is damaged")
    path.unlink()
    refused(directory, "adapter_model.safetensors is missing")
    path.with_suffix(".bin").touch()
    refused(directory, "is a pickle, which is not read. Load it with peft and save_pretrained it again")
    (directory / "adapter_config.json").write_text("[1]")
    refused(directory, "is damaged: it contains no JSON object")
    (directory / "adapter_config.json").unlink()
    refused(directory, "contains no adapter.json, so it is no adapter directory")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tie_that_peft_cuts(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name], **LORA)
    refused(pd.saved(pd.wrapped("llama", config), tmp_path), f"{name}.weight, which is tied to .* peft cuts that tie")


def test_a_scaled_input_of_a_fused_projection(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=["c_attn"])
    words = "scales the input of transformer.h.0.attn.c_attn, which is fused: 0.attention.q, 0.attention.k"
    refused(pd.saved(pd.wrapped("gpt2", config), tmp_path), words, "gpt2")


def test_names(directory: Path) -> None:
    loaded = zoo.traced("llama").load_adapter(directory)
    with pytest.raises(pg.Conflict, match="exists already"):
        loaded.load_adapter(directory)
    both = loaded.load_adapter(directory, name="second")
    assert both.only("second").history[0].name == ""
    again, first = (one.table[f"model.layers.0.self_attn.q_proj.{name}lora_A"].tensor
                    for one, name in ((both, "second."), (loaded, "")))  # fmt: skip
    assert torch.equal(again, first)


def test_another_base(directory: Path) -> None:
    words = "adapts model.layers.0.self_attn.q_proj, which is no weight of this model. program.sites lists the sites"
    refused(directory, words, "nano")


# prompts and prefixes

LENGTH = 4
ROWS = {"num_virtual_tokens": LENGTH}
CAUSAL, HIDDEN = {"task_type": "CAUSAL_LM", **ROWS}, {"task_type": "FEATURE_EXTRACTION", **ROWS}
SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM", **ROWS}
PROMPTS = {
    "prompt-llama": ("llama", peft.PromptTuningConfig(**CAUSAL), "prompt{at=embedding length=4"),
    "prompt-gpt2": ("gpt2", peft.PromptTuningConfig(**CAUSAL), "prompt{at=embedding length=4"),
    "prompt-bert": ("bert", peft.PromptTuningConfig(**HIDDEN), "prompt{at=embedding length=4"),
    "prompt-t5": ("t5", peft.PromptTuningConfig(**SEQ2SEQ), "encoder"),
    "prompt-t5-encoder": ("t5", peft.PromptTuningConfig(**SEQ2SEQ, num_transformer_submodules=1), "encoder"),
    "lstm": (
        "llama",
        peft.PromptEncoderConfig(**CAUSAL, encoder_reparameterization_type="LSTM", encoder_hidden_size=6),
        'ptuning{at=embedding length=4 token=none encoder="none"',
    ),
    "mlp": ("gpt2", peft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=6), "ptuning{"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case: str, tmp_path: Path) -> None:
    name, config, spec = PROMPTS[case]
    theirs = pd.wrapped(name, config)
    loaded = zoo.traced(name).load_adapter(pd.saved(theirs, tmp_path))
    inputs = zoo.example(name)
    ours, wanted = pd.asked(loaded.module(), inputs), pd.asked(theirs, inputs)
    assert pd.difference(ours, wanted[:, -ours.shape[1] :]) < 1e-6  # theirs answers for the rows too
    assert pd.difference(ours, pd.asked(zoo.build(name), inputs)) > 1e-3
    assert spec in str(loaded.recipe)


@pytest.mark.parametrize(("name", "hidden"), [("llama", None), ("gpt2", 6)])
def test_prefixes(name: str, hidden: int | None, tmp_path: Path) -> None:
    options = CAUSAL | {"encoder_hidden_size": hidden}
    theirs = pd.wrapped(name, peft.PrefixTuningConfig(**options, prefix_projection=hidden is not None))
    directory = pd.saved(theirs, tmp_path)
    inputs = zoo.example(name)
    program, positions = pd.positioned(name, LENGTH)
    with pytest.warns(UserWarning, match="position_ids that start at 4"):
        loaded = program.load_adapter(directory)
    ours, wanted = pd.asked(loaded.module(), inputs | positions), pd.asked(theirs, inputs)
    assert pd.difference(ours, wanted) < 1e-6
    assert "prefix{at=attention.core length=4 hidden=none" in str(loaded.recipe)


@pytest.mark.parametrize("layers", [1, 2])
def test_llama_adapters(layers: int, tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=layers)
    theirs = pd.wrapped("llama", config)
    loaded = zoo.traced("llama").load_adapter(pd.saved(theirs, tmp_path))
    inputs = zoo.example("llama")
    assert pd.difference(pd.asked(loaded.module(), inputs), pd.asked(theirs, inputs)) < 1e-6
    assert len(loaded.edits) == layers


@pytest.mark.parametrize("layers", [1, 2])
def test_what_peft_calls_so_in_gpt2(layers: int, tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=layers)
    theirs = pd.wrapped("gpt2", config)
    with pytest.warns(UserWarning, match="as peft does in GPT-2: it is loaded as it was trained") as caught:
        loaded = zoo.traced("gpt2").load_adapter(pd.saved(theirs, tmp_path))
    assert caught[0].filename == __file__
    inputs = zoo.example("gpt2")
    wanted = pd.asked(theirs, inputs)
    assert pd.difference(pd.asked(loaded.module(), inputs), wanted) < 1e-6
    assert pd.difference(pd.asked(zoo.build("gpt2"), inputs), wanted) > 1e-3
    assert "zero_init_prefix{at=attention" in str(loaded.recipe)
    assert len(loaded.edits) == layers
