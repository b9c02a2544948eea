"""Adapters of huggingface/peft merged by shard: the bits of peft's own merge, and what is not merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import sharded
import torch
import zoo
from sharded import contents, differing, silent

import peftgraph as pg
from peftgraph.interop.checkpoints.checkpoint import Checkpoint
from peftgraph.interop.checkpoints.shard_writer import write_shards
from peftgraph.interop.peft.config import CONFIG, TENSORS
from peftgraph.interop.peft.merge_updates import PeftUpdates, peft_updates
from peftgraph.model_folders.loading import skeleton
from peftgraph.passes import LoRA

LORA, IA3 = peft.LoraConfig, peft.IA3Config
BERT_HIDDEN = ["output.dense"]


def lora(*targets: str, **options: Any) -> peft.PeftConfig:
    return LORA(target_modules=list(targets), r=3, lora_alpha=5, **options)


CASES: dict[str, tuple[str, peft.PeftConfig, torch.dtype]] = {
    "dora, embedding, a bias, a module": ("bert", lora("query", "word_embeddings", use_dora=True, bias="lora_only",
                                                       modules_to_save=["pooler"]), torch.float32),
    "patterns": ("bert", lora("query", "value", use_rslora=True, bias="all", rank_pattern={"value": 4},
                              alpha_pattern={"layer.1.*query": 7}), torch.float32),
    "transposed, with a bias of B": ("gpt2", lora("c_attn", "c_proj", lora_bias=True), torch.float32),
    "transposed, rounded": ("gpt2", lora("c_attn", "c_proj"), torch.bfloat16),
    "ia3": ("bert", IA3(target_modules=["key", "value", *BERT_HIDDEN], feedforward_modules=BERT_HIDDEN), torch.float32),
    "ia3, transposed": ("gpt2", IA3(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
                        torch.float32),
    "parameters by themselves": ("llama", lora(target_parameters=["self_attn.o_proj.weight"], alpha_pattern={
        "self_attn.o_proj.weight": 9}), torch.float32),
    "tokens of a tied table": ("llama", lora("q_proj", trainable_token_indices=[5, 2]), torch.bfloat16),
    "tokens alone": ("bert", peft.TrainableTokensConfig(token_indices=[60, 3]), torch.float32),
    "tokens of two tables": ("mixtral", lora("q_proj", trainable_token_indices={
        "embed_tokens": [5], "lm_head": [7, 2]}), torch.float32),
    "untied embedding and head": ("mixtral", lora("embed_tokens", modules_to_save=["lm_head"]), torch.float32),
}  # fmt: skip


def trained(name: str, config: peft.PeftConfig, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """A small model with an adapter whose every parameter has moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(zoo.build(name, dtype=dtype), config)  # pyright: ignore
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(name: str, config: peft.PeftConfig, folder: Path, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """The same, saved in `adapter`, with its base in `model`."""
    sharded.saved(name, folder / "model", dtype)
    model = trained(name, config, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder / "adapter"))
    return model


def updates(folder: Path) -> tuple[Checkpoint, PeftUpdates]:
    checkpoint = Checkpoint.open(folder / "model")
    return checkpoint, peft_updates(skeleton(folder / "model", checkpoint.dtype), folder / "adapter", checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_shards_hold_the_bits_of_pefts_merge(case: str, tmp_path: Path) -> None:
    name, config, dtype = CASES[case]
    model = saved(name, config, tmp_path, dtype)
    checkpoint, found = updates(tmp_path)
    write_shards(checkpoint, found, tmp_path / "out", silent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_and_unload().save_pretrained(tmp_path / "whole")  # pyright: ignore
    expected = contents(tmp_path / "whole")
    assert differing(contents(tmp_path / "out"), expected) == []
    assert set(differing(expected, contents(tmp_path / "model"))) <= found.changed.keys()
    assert found.changed


def test_the_same_lora_gives_the_same_bits_in_both_formats(tmp_path: Path) -> None:
    sharded.saved("bert", tmp_path / "model", torch.bfloat16)
    tuned = zoo.randomise(zoo.traced("bert", dtype=torch.bfloat16).apply(LoRA(at="attention.q", rank=3, alpha=5.0)))
    own, ours = sharded.own_updates(tmp_path / "model", tuned.save_adapter(tmp_path / "ours"))
    model = trained("bert", lora("query"), torch.bfloat16)
    with torch.no_grad():
        for name, value in tuned.table.trainable.items():
            module, _, leaf = name.rpartition(".")
            model.get_parameter(f"base_model.model.{module}.{leaf}.default.weight").copy_(value)
    model.save_pretrained(str(tmp_path / "adapter"))
    checkpoint, theirs = updates(tmp_path)
    assert theirs.changed == ours.changed
    for key in ours.changed:
        assert torch.equal(theirs.value(key, checkpoint.read), ours.value(key, own.read))


ADALORA = peft.AdaLoraConfig(
    target_modules=["query", "output.dense"], init_r=4, target_r=2, lora_alpha=5, total_step=10, bias="all"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adalora_is_merged_as_a_whole_fold_merges_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """To the bit; and as peft merges it, but for rounding: it multiplies by alpha before it divides by the rank."""
    saved("bert", ADALORA, tmp_path, dtype)
    cut_triplets(tmp_path / "adapter")
    checkpoint, found = updates(tmp_path)
    write_shards(checkpoint, found, tmp_path / "out", silent)
    base = zoo.traced("bert", dtype=dtype)
    merged = pg.fold(base.load_adapter(tmp_path / "adapter")).table
    ours = contents(tmp_path / "out")
    changed = {name: value for name, value in ours.items() if name in found.changed}
    assert len(changed) > 4
    for name, value in changed.items():
        assert torch.equal(value, merged[name].tensor), name
    if dtype == torch.float32:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = peft.PeftModel.from_pretrained(zoo.build("bert"), str(tmp_path / "adapter"))
            theirs = dict(whole.merge_and_unload().named_parameters())  # pyright: ignore
        for name, value in changed.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def cut_triplets(folder: Path) -> None:
    """Keep the first and the last triplet of every query, and all of the others, as a finished training does."""
    path = folder / TENSORS
    whole = safetensors.torch.load_file(path)
    pattern: dict[str, list[bool]] = {}
    for name in [name for name in whole if name.endswith("lora_E")]:
        module = name.removesuffix(".lora_E")
        kept = [True, False, False, True] if "query" in name else [True] * 4
        pattern[f"{module.removeprefix('base_model.model.')}.lora_E"] = kept
        rows = torch.tensor(kept)
        for part in ("A", "E"):
            whole[f"{module}.lora_{part}"] = whole[f"{module}.lora_{part}"][rows].contiguous()
        whole[f"{module}.lora_B"] = whole[f"{module}.lora_B"][:, rows].contiguous()
    safetensors.torch.save_file(whole, path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": pattern}))


def test_triplets_that_do_not_fit_the_pattern_are_refused(tmp_path: Path) -> None:
    saved("bert", ADALORA, tmp_path)
    cut_triplets(tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    config = json.loads(path.read_text())
    name = next(name for name in config["rank_pattern"] if "query" in name)
    for kept, reason in (([True] * 4, "have shapes"), ([True] * 3, "is no list of 4 booleans")):
        path.write_text(json.dumps(config | {"rank_pattern": config["rank_pattern"] | {name: kept}}))
        with pytest.raises(pg.AdapterError, match=reason):
            updates(tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("llama", lora("embed_tokens"), "tied to lm_head.weight"),
        ("llama", lora("q_proj", modules_to_save=["lm_head"]), "tied to model.embed_tokens.weight"),
        ("llama", lora("q_proj", trainable_token_indices={"lm_head": [1, 2]}), "tied to model.embed_tokens.weight"),
        ("llama", lora("q_proj", init_lora_weights="pissa"), "changes the base's weights too"),
        ("bert", peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"), "PROMPT_TUNING"),
    ],
    ids=["tied", "tied, saved", "tokens", "pissa", "prompt"],
)
def test_what_is_not_exact_is_refused(name: str, config: peft.PeftConfig, reason: str, tmp_path: Path) -> None:
    saved(name, config, tmp_path)
    with pytest.raises(pg.AdapterError, match=reason):
        updates(tmp_path)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved("bert", lora("query"), tmp_path)
    path = tmp_path / "adapter" / TENSORS
    whole = safetensors.torch.load_file(path)
    key = next(key for key in whole if "lora_A" in key)

    def refused(tensors: dict[str, torch.Tensor], reason: str) -> None:
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(pg.AdapterError, match=reason):
            updates(tmp_path)

    refused(whole | {key.replace("query", "ghost"): whole[key].clone()}, "does not have")
    refused(whole | {key: whole[key][:, :-1].contiguous()}, "have shapes")
    refused({k: v for k, v in whole.items() if k != key}, "have shapes")
    refused(whole | {"base_model.model.pooler.dense.weight": torch.zeros(3)}, "has shape")
    safetensors.torch.save_file(whole, path)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(pg.AdapterError, match="have shapes"):
        updates(tmp_path)
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | {"from_the_future": 3}))
    with pytest.raises(pg.AdapterError, match="from_the_future=3"):
        updates(tmp_path)
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    path.unlink()
    with pytest.raises(pg.AdapterError, match="Pickled adapters are not read"):
        updates(tmp_path)
