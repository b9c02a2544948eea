"""Directories in peft's format: peft loads them and answers as this program does, and they are read back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft_directories as pd
import pytest
import torch
import zoo

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import (
    IA3,
    BitFit,
    DoRA,
    LoRA,
    ParallelAdapter,
    Prefix,
    Prompt,
    PTuning,
    Train,
    UniPELT,
    ZeroInitPrefix,
)

ALL = "attention.*|ffn.*"
CASES: dict[str, tuple[str, tuple[Pass, ...]]] = {
    "two": ("llama", (LoRA(rank=3),)),
    "all": ("bert", (LoRA(at=ALL, rank=3, alpha=5.0),)),
    "layers": ("llama", (LoRA(at="attention.q&layers(1)", rank=3),)),
    "ranks": ("llama", (LoRA(at="attention.q", rank=3), LoRA(at="attention.v&layers(0)", rank=2, alpha=7.0))),
    "stabilised": ("llama", (LoRA(rank=3, rank_stabilised=True, weight=-0.5),)),
    "pissa": ("llama", (LoRA(rank=3, init="pissa"),)),
    "olora": ("gpt2", (LoRA(at="attention.o", rank=3, init="olora"),)),
    "named": ("llama", (LoRA(rank=2, name="dog"), LoRA(at="attention.q", rank=3, alpha=5.0, name="toy"))),
    "query-of-three": ("gpt2", (LoRA(at="attention.q", rank=3),)),
    "query-and-value-of-three": ("gpt_neox", (LoRA(rank=3),)),
    "fused": ("nano", (LoRA(at="attention.k|attention.o|ffn.*", rank=3),)),
    "seq2seq": ("t5", (LoRA(at="attention.q|ffn.down", rank=3),)),
    "embedding-and-tied-head": ("llama", (LoRA(at="embedding|head", rank=3),)),
    "experts": ("mixtral", (LoRA(at="ffn.*|attention.v", rank=3),)),
    "half-of-the-experts": ("mixtral", (LoRA(at="ffn.up", rank=3),)),
    "bias": ("bert", (LoRA(at="attention.q", rank=3, bias="all"),)),
    "bias-of-its-own": ("gpt2", (LoRA(at="attention.q|attention.o", rank=3, bias="lora_only"),)),
    "some-biases": ("bert", (LoRA(at="attention.q", rank=3), BitFit(at="attention.q|ffn.up"))),
    "bias-of-a-slice": ("gpt2", (LoRA(at="attention.v", rank=3), BitFit(at="attention.v"))),
    "dora": ("bert", (DoRA(rank=3),)),
    "dora-of-an-embedding": ("bert", (DoRA(at="embedding|attention.q", rank=3),)),
    "dora-of-a-slice": ("gpt2", (DoRA(at="attention.v|ffn.up", rank=3),)),
    "dora-and-biases": ("bert", (DoRA(at="attention.v", rank=3), BitFit())),
    "head": ("vit", (LoRA(rank=3), Train(at="head"))),
    "norm-and-head": ("vit", (LoRA(rank=3), Train(at="norm"), Train(at="head"))),
    "ia3": ("llama", (IA3(),)),
    "ia3-of-a-slice": ("gpt2", (IA3(),)),
    "ia3-and-head": ("vit", (IA3(), Train(at="head"))),
    "ia3-inputs": ("bert", (IA3(at="attention.o|ffn.up", side="input"),)),
    "llama-adapter-in-gpt2": ("gpt2", (ZeroInitPrefix(at="attention&layers(1)", length=4, gate="layer"),)),
    "llama-adapter": ("llama", (ZeroInitPrefix(at="attention.core&layers(1)", length=4, gate="layer", tanh=True),)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_peft_answers_alike_and_it_is_read_back(case: str, tmp_path: Path) -> None:
    name, methods = CASES[case]
    tuned = zoo.randomise(zoo.traced(name).apply(*methods), 0.2)
    directory = tuned.save_adapter(tmp_path / "adapter", format="peft")
    inputs = zoo.example(name)
    ours = pd.asked(tuned.module(), inputs)
    tolerance = 1e-5 if name == "mixtral" else 1e-6  # peft adds B A to the experts' weights first
    assert pd.difference(pd.asked(pd.read_by_peft(name, directory), inputs), ours) < tolerance
    assert pd.difference(ours, pd.asked(zoo.build(name), inputs)) > 1e-3
    assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*it is loaded as it was trained")
        again = zoo.traced(name).load_adapter(directory)
    assert pd.difference(pd.asked(again.module(), inputs), ours) < 1e-6


@pytest.mark.parametrize("method", [
    LoRA(at="attention.q", rank=3), LoRA(rank=2, alpha=4.0), DoRA(at="attention.v", rank=3), IA3(),
], ids=lambda method: method.word)  # fmt: skip
def test_a_part_of_a_fused_weight_comes_back_as_the_part(method: Pass, tmp_path: Path) -> None:
    tuned = zoo.randomise(zoo.traced("gpt2").apply(method), 0.2)
    again = zoo.traced("gpt2").load_adapter(tuned.save_adapter(tmp_path / "adapter", format="peft"))
    assert str(again.recipe) == str(tuned.recipe)
    for name, parameter in tuned.table.trainable.items():
        assert torch.equal(again.table[name].tensor, parameter), name


PROMPTS: dict[str, tuple[str, Pass]] = {
    "llama": ("llama", Prompt(length=4)),
    "gpt2": ("gpt2", PTuning(length=4, hidden=6)),
    "bert": ("bert", PTuning(length=4, encoder="mlp")),
    "t5": ("t5", Prompt(length=4)),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case: str, tmp_path: Path) -> None:
    name, method = PROMPTS[case]
    tuned = zoo.randomise(zoo.traced(name).apply(method), 0.2)
    directory = tuned.save_adapter(tmp_path / "adapter", format="peft")
    inputs = zoo.example(name)
    ours, theirs = pd.asked(tuned.module(), inputs), pd.asked(pd.read_by_peft(name, directory), inputs)
    assert pd.difference(theirs[:, -ours.shape[1] :], ours) < 1e-6
    assert pd.difference(pd.asked(zoo.traced(name).load_adapter(directory).module(), inputs), ours) < 1e-6


def test_a_prompt_and_a_head(tmp_path: Path) -> None:
    tuned = zoo.randomise(zoo.traced("gpt_neox").apply(Prompt(length=4), Train(at="head")), 0.2)
    directory = tuned.save_adapter(tmp_path / "adapter", format="peft")
    inputs = zoo.example("gpt_neox")
    ours, theirs = pd.asked(tuned.module(), inputs), pd.asked(pd.read_by_peft("gpt_neox", directory), inputs)
    assert pd.difference(theirs[:, 4:], ours) < 1e-6
    assert pd.difference(pd.asked(zoo.traced("gpt_neox").load_adapter(directory).module(), inputs), ours) < 1e-6


@pytest.mark.parametrize("hidden", [None, 6])
def test_a_prefix(hidden: int | None, tmp_path: Path) -> None:
    inputs = zoo.example("llama")
    program, positions = pd.positioned("llama", 4)
    tuned = zoo.randomise(program.apply(Prefix(length=4, hidden=hidden)), 0.2)
    with pytest.warns(UserWarning, match="position_ids that start at 4 for the answers that peft gives") as caught:
        directory = tuned.save_adapter(tmp_path / "adapter", format="peft")
    assert caught[0].filename == __file__
    ours = pd.asked(tuned.module(), inputs | positions)
    assert pd.difference(pd.asked(pd.read_by_peft("llama", directory), inputs), ours) < 1e-6


# what peft's format cannot say

REFUSED: dict[str, tuple[str, tuple[Pass, ...], str]] = {
    "no-such-method": ("nano", (LoRA(), ParallelAdapter()), "parallel_adapter{.* at 0.ffn at stack.0 cannot be written "
                       "for peft, which has no parallel_adapter"),
    "gated": ("llama", (UniPELT(),), "cannot be written for peft, which has no unipelt"),
    "two-methods": ("llama", (LoRA(), IA3()), "one method in a directory, and these are lora and ia3"),
    "dora-beside-lora": ("llama", (LoRA(), DoRA(at="ffn.up")), "these are lora and dora"),
    "base-alone": ("vit", (Train(at="head"),), "train{.* trains the base alone"),
    "dropouts": ("llama", (LoRA(at="attention.q", dropout=0.1), LoRA(at="attention.v")), r"one dropout for all.*0.1"),
    "dropout-of-experts": ("mixtral", (LoRA(at="ffn.up", dropout=0.1),), "one dropout at 0.ffn.up at model.layers.0"),
    "dora-of-experts": ("mixtral", (DoRA(at="ffn.up", rank=2),), "peft has no DoRA of experts"),
    "other-dora": ("llama", (DoRA(form="adapters"),), "peft's DoRA is the paper's, which answers otherwise"),
    "two-doras": ("llama", (DoRA(name="a", at="attention.q"), DoRA(name="b", at="attention.q")), "two DoRAs are on"),
    "adapted-and-trained": ("vit", (LoRA(at="head", rank=2), Train(at="head")), "classifier trains and is adapted"),
    "scaled-twice": ("bert", (IA3(at="attention.o"), IA3(at="attention.o", side="input", name="x")), "not both"),
    "scaled-experts": ("mixtral", (IA3(),), r"ia3{.* at 0.ffn.hidden at .*experts.down_proj: peft's \(IA\)3 scales"),
    "new-biases": ("llama", (LoRA(), BitFit(at="attention.q", zero=True)), "it adds a bias where there is none"),
    "unknown-task": ("nano", (Prompt(length=2),), "peft prepends rows only for tasks that it knows; Nano"),
    "decoder-prompt": ("t5", (Prompt(at="embedding", length=2),), "its prompt is at one embedding"),
    "prompt-inside": ("bert", (Prompt(length=2, place="after_first"),), "its rows precede all tokens"),
    "some-layers": ("llama", (Prefix(at="attention.core&layers(1)", hidden=None),), "once in every attention of one"),
    "two-stacks": ("t5", (Prefix(hidden=None),), "once in every self-attention of the decoder"),
    "gate-a-head": ("llama", (ZeroInitPrefix(length=2),), "it has one gate a layer, in Llama, Mistral, GPT2"),
    "gate-elsewhere": ("mixtral", (ZeroInitPrefix(length=2, gate="layer"),), "in Llama, Mistral, GPT2 models"),
    "gate-under-the-output": ("gpt2", (ZeroInitPrefix(length=2, gate="layer"),), "peft's is at attention"),
    "lower-layers": ("llama", (ZeroInitPrefix(at="attention.core&layers(0)", length=2, gate="layer"),), "uppermost"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    name, methods, words = REFUSED[case]
    tuned = zoo.traced(name).apply(*methods)
    with pytest.raises(pg.AdapterError, match=words):
        tuned.save_adapter(tmp_path / "adapter", format="peft")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_save_and_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(pg.AdapterError, match="nothing to save"):
        zoo.traced("nano").save_adapter(tmp_path, format="peft")
    with pytest.raises(pg.AdapterError, match="format must be one of peftgraph, adapterhub, peft, got 'pickle'"):
        zoo.traced("nano").apply(LoRA()).save_adapter(tmp_path, format="pickle")
    with pytest.raises(pg.AdapterError, match="Adapters in the format 'adapterhub' are read only, not written"):
        zoo.traced("nano").apply(LoRA()).save_adapter(tmp_path, format="adapterhub")


# the disk


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return zoo.randomise(zoo.traced("nano").apply(LoRA(rank=2))).save_adapter(tmp_path / "adapter", format="peft")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_saving_again_replaces_and_keeps_the_readme(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    zoo.traced("nano").apply(LoRA(at="ffn.up", rank=3)).save_adapter(saved, format="peft")
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 3
    assert contents(saved).keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert (saved / "README.md").read_text() == "mine"
    assert list(saved.parent.iterdir()) == [saved]


def test_other_files_are_left_alone(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    before = contents(saved)
    with pytest.raises(pg.AdapterError, match=r"holds notes.txt, which is not peft's. Choose another directory"):
        zoo.traced("nano").apply(LoRA(at="ffn.up", rank=3)).save_adapter(saved, format="peft")
    assert contents(saved) == before


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(pg.AdapterError, match="adapter cannot be written: it is a file"):
        zoo.traced("nano").apply(LoRA()).save_adapter(tmp_path / "adapter", format="peft")
    assert (tmp_path / "adapter").read_text() == "mine"
