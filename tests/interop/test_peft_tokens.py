"""Trained tokens in peft's format, both ways: tied and untied tables, beside a LoRA and alone, and a vocabulary that
was resized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import peft_directories as pd
import pytest
import torch
import zoo
from torch import nn

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, DoRA, LoRA, Train, TrainableTokens

TOKENS = [60, 3, *range(20, 50, 2)]
HEAD = [5, 7, 9]


def untied() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2)).eval()


def masked() -> nn.Module:
    """BERT with its head, which is tied and has a bias of its own."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=6)).eval()


OWN = {"untied": (untied, "llama"), "masked": (masked, "bert")}


def built(name: str) -> nn.Module:
    return OWN[name][0]() if name in OWN else zoo.build(name)


def inputs_of(name: str) -> dict[str, Any]:
    return zoo.example(OWN[name][1] if name in OWN else name)


def base_of(name: str) -> pg.Program:
    return pg.trace(built(name), inputs_of(name)) if name in OWN else zoo.traced(name)


def beside(targets: Any, tokens: Any, **more: Any) -> peft.PeftConfig:
    return peft.LoraConfig(target_modules=targets, trainable_token_indices=tokens, r=3, **more)


def alone(tokens: list[int] = TOKENS, **more: Any) -> peft.PeftConfig:
    return peft.TrainableTokensConfig(token_indices=tokens, **more)


READ: dict[str, tuple[str, peft.PeftConfig, int]] = {  # and how many tables have rows
    "llama": ("llama", alone(), 1),
    "t5": ("t5", alone(), 1),
    "bart": ("bart", alone(), 1),
    "gemma2-scales": ("gemma2", alone(), 1),
    "hand-written": ("nano", alone(target_modules=["tok"]), 1),
    "masked": ("masked", alone(), 1),
    "untied": ("untied", alone(), 1),
    "untied-both": ("untied", alone(target_modules=["embed_tokens", "lm_head"]), 2),
    "lora-llama": ("llama", beside(["q_proj"], TOKENS), 1),
    "lora-tied-named": ("llama", beside(["q_proj"], {"embed_tokens": TOKENS, "lm_head": TOKENS}), 1),
    "lora-t5": ("t5", beside(["q"], {"shared": TOKENS}), 1),
    "lora-bert": ("bert", beside(["query"], TOKENS), 1),
    "dora-gpt2": ("gpt2", beside(["c_attn"], {"wte": TOKENS}, use_dora=True), 1),
    "lora-untied": ("untied", beside("all-linear", TOKENS), 1),
    "lora-untied-both": ("untied", beside(["q_proj"], {"embed_tokens": TOKENS, "lm_head": HEAD}), 2),
}


@pytest.mark.parametrize("case", READ)
def test_outputs_are_pefts(case: str, tmp_path: Path) -> None:
    name, config, tables = READ[case]
    theirs = pd.wrapped(name, config, built(name))
    loaded = base_of(name).load_adapter(pd.saved(theirs, tmp_path))
    inputs = inputs_of(name)
    ours, wanted = pd.asked(loaded.module(), inputs), pd.asked(theirs, inputs)
    assert pd.difference(ours, wanted) < 1e-6
    assert pd.difference(ours, pd.asked(built(name), inputs)) > 1e-3
    assert [applied.method.word for applied in loaded.history].count("trainable_tokens") == tables
    assert pd.difference(pd.asked(pg.fold(loaded).module(), inputs), wanted) < 1e-5


ROWS = TrainableTokens(tokens=tuple(TOKENS))
WRITE: dict[str, tuple[str, tuple[Pass, ...]]] = {
    **{name: (name, (ROWS,)) for name in ("llama", "gpt2", "t5", "bert", "bart", "nano", "untied", "masked")},
    **{f"lora-{name}": (name, (ROWS, LoRA(rank=3))) for name in ("llama", "t5", "gpt2", "nano", "masked")},
    "both": ("untied", (ROWS, TrainableTokens(tokens=tuple(TOKENS), at="head", name="h"))),
    "lora-both": ("untied", (LoRA(rank=3), ROWS, TrainableTokens(tokens=tuple(HEAD), at="head", name="h"))),
    "dora-two": ("llama", (DoRA(rank=3), ROWS, TrainableTokens(tokens=(5, 9), name="more"))),
    "lora-and-head": ("untied", (LoRA(rank=3), ROWS, Train(at="head"))),
    "lora-and-all-tokens": ("llama", (LoRA(rank=3), Train(at="embedding"))),
}


@pytest.mark.parametrize("case", WRITE)
def test_peft_answers_alike_and_it_is_read_back(case: str, tmp_path: Path) -> None:
    name, methods = WRITE[case]
    base = base_of(name)
    tuned = zoo.randomise(base.apply(*methods), 0.2)
    directory = tuned.save_adapter(tmp_path / "adapter", format="peft")
    inputs = inputs_of(name)
    ours = pd.asked(tuned.module(), inputs)
    assert pd.difference(pd.asked(pd.read_by_peft(name, directory, built(name)), inputs), ours) < 1e-6
    assert pd.difference(ours, pd.asked(built(name), inputs)) > 1e-3
    again = base.load_adapter(directory)
    assert pd.difference(pd.asked(again.module(), inputs), ours) < 1e-6
    assert again.count().trainable == tuned.count().trainable


def test_the_bias_of_a_tied_head_is_spoken_of(tmp_path: Path) -> None:
    model = masked()
    torch.nn.init.normal_(model.get_parameter("cls.predictions.bias"))
    base = pg.trace(model, inputs_of("masked"))
    tuned = base.apply(ROWS)
    words = "peft leaves cls.predictions.decoder.bias out where cls.predictions.decoder has trained tokens"
    for methods in ((), (LoRA(rank=2),)):
        with pytest.warns(UserWarning, match=words) as caught:
            directory = tuned.apply(*methods).save_adapter(tmp_path / "adapter", format="peft")
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match=words) as caught:
            base.load_adapter(directory)
        assert caught[0].filename == __file__


# what is refused

NOT_WRITTEN: dict[str, tuple[str, tuple[Pass, ...], str]] = {
    "scales": ("llama", (ROWS, IA3()), "one method in a directory, and these are trainable_tokens and ia3"),
    "head": (
        "untied",
        (ROWS, Train(at="head")),
        "peft saves no other parameters beside it, and lm_head.weight trains",
    ),
    "tables": (
        "untied",
        (ROWS, TrainableTokens(tokens=(5,), at="head", name="h")),
        "at head at lm_head: peft trains the same tokens of all tables where there is no LoRA beside",
    ),
    "whole": ("llama", (LoRA(), Train(at="embedding"), ROWS), "model.embed_tokens trains and is adapted"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_the_format_cannot_say(case: str, tmp_path: Path) -> None:
    name, methods, words = NOT_WRITTEN[case]
    with pytest.raises(pg.AdapterError, match=words):
        base_of(name).apply(*methods).save_adapter(tmp_path / "adapter", format="peft")
    assert list(tmp_path.iterdir()) == []


class ByTable(nn.Module):
    """A head that multiplies by the embedding's own weight."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        object.__setattr__(self, "table", table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.table.weight)


def test_a_tie_that_peft_does_not_know_of(tmp_path: Path) -> None:
    model = zoo.Nano(layers=1).eval()
    directory = pd.saved(pd.wrapped("nano", alone(target_modules=["tok"]), zoo.Nano(layers=1)), tmp_path / "theirs")
    words = "one table's rows only in a model of transformers whose configuration"
    model.vocab.weight = model.tok.weight
    with pytest.raises(pg.AdapterError, match=words):
        pg.trace(model, zoo.example("nano")).apply(ROWS).save_adapter(tmp_path / "adapter", format="peft")
    model.vocab = ByTable(model.tok)
    program = pg.trace(model, zoo.example("nano"))
    assert len(program.apply(ROWS).edits) == 2
    with pytest.raises(pg.AdapterError, match=words):
        program.apply(ROWS).save_adapter(tmp_path / "adapter", format="peft")
    with pytest.raises(pg.AdapterError, match="has tokens of tok, whose weight head at tok reads too"):
        program.load_adapter(directory)


NOT_READ: dict[str, tuple[str, peft.PeftConfig, str]] = {
    "other-tokens": ("llama", beside(["q_proj"], {"embed_tokens": TOKENS, "lm_head": HEAD}), "has other tokens of lm_"
                     "head than of model.embed_tokens, which are tied here, and peft cuts that tie. Trace a model"),
    "one-of-three": ("t5", alone(target_modules=["encoder.embed_tokens"]), "has tokens of encoder.embed_tokens alone, "
                     "which is tied to shared here, and peft cuts that tie"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_READ)
def test_ties_that_peft_cuts(case: str, tmp_path: Path) -> None:
    name, config, words = NOT_READ[case]
    with pytest.raises(pg.AdapterError, match=words):
        base_of(name).load_adapter(pd.saved(pd.wrapped(name, config, built(name)), tmp_path))


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer": ({"token_indices": [3]}, "has 17 rows, adapter_config.json says 1 tokens"),
    "words": ({"token_indices": ["a"] * 17}, "is damaged: the tokens of .* cannot be"),
    "twice": ({"token_indices": [3] * 17}, "token 3 is named twice"),
    "kind": ({"token_indices": 3}, "is damaged: token_indices cannot be 3"),
    "beyond": ({"token_indices": list(range(50, 67))}, "token 61 is outside of the table of embedding at model"),
    "elsewhere": ({"target_modules": ["wte"]}, "embed_tokens has tensors, but target_modules does not select it"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_options_that_say_something_else(case: str, tmp_path: Path) -> None:
    directory = pd.saved(pd.wrapped("llama", alone()), tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | DAMAGED[case][0]))
    with pytest.raises(pg.PeftGraphError, match=DAMAGED[case][1]):
        zoo.traced("llama").load_adapter(directory)


def test_rows_that_the_file_lacks(tmp_path: Path) -> None:
    directory = pd.saved(pd.wrapped("llama", peft.LoraConfig(target_modules=["q_proj"])), tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [3]}))
    with pytest.raises(pg.AdapterError, match="tokens of the embedding train, of which the file has no tensors"):
        zoo.traced("llama").load_adapter(directory)


# a vocabulary that was resized: peft saves the embedding and the head as well


def resized(tied: bool, folder: Path, seed: int) -> nn.Module:
    """A saved model with three more tokens, whose rows are drawn anew each time."""
    from transformers import LlamaForCausalLM

    if not folder.exists():
        model = zoo.build("llama") if tied else untied()
        model.save_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    model.resize_token_embeddings(zoo.VOCAB + 3, mean_resizing=False)
    return model


NEW = [zoo.VOCAB, zoo.VOCAB + 1, zoo.VOCAB + 2]
RESIZED = {
    "lora": peft.LoraConfig(target_modules=["q_proj"], r=3),
    "tokens": beside(["q_proj"], NEW),
    "alone": alone(NEW),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary(case: str, tied: bool, tmp_path: Path) -> None:
    model = resized(tied, tmp_path / "base", 7)
    theirs = pd.wrapped("llama", RESIZED[case], model)
    directory = pd.saved(theirs, tmp_path / "adapter")
    ids = torch.tensor([[3, zoo.VOCAB, 9, zoo.VOCAB + 2], [zoo.VOCAB + 1, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for seed, extra in ((7, []), (8, ["train"])):  # the same new rows in the base, and others
        base = pg.trace(resized(tied, tmp_path / "base", seed), inputs)
        loaded = base.load_adapter(directory)
        wanted = pd.asked(pd.read_by_peft("llama", directory, resized(tied, tmp_path / "base", seed)), inputs)
        assert pd.difference(pd.asked(loaded.module(), inputs), wanted) < 1e-6
        words = [applied.method.word for applied in loaded.history]
        assert [word for word in words if word == "train"] == extra
        again = base.apply(*loaded.recipe.passes())
        assert again.count().trainable == loaded.count().trainable
    small = zoo.traced("llama") if tied else base_of("untied")
    with pytest.raises(pg.PeftGraphError, match="resize the model before it is traced"):
        small.load_adapter(directory)
