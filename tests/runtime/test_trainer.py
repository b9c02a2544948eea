"""transformers' Trainer trains a program as it trains the model: beside peft, step by step."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import zoo
from torch import Tensor
from transformers import Trainer, TrainingArguments

import peftgraph as pg
from peftgraph.passes import LoRA

# peft asks the model in a way that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
Row = dict[str, Tensor]


def rows(count: int = 12, labels: bool = True) -> list[Row]:
    """Texts of one length, of which different numbers of tokens are to be learned."""
    generator = torch.Generator().manual_seed(7)
    made: list[Row] = []
    for i in range(count):
        ids = torch.randint(3, zoo.VOCAB, (8,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if labels:
            row["labels"] = ids.masked_fill(torch.arange(8) < i % 6, -100)
        made.append(row)
    return made


@cache
def traced(drops: bool = True) -> pg.Program:
    example = transformers.default_data_collator(rows(3)) | {"num_items_in_batch": torch.tensor(9.0)}
    model: Any = zoo.build("llama", dtype=torch.float64)
    for layer in () if drops else model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return pg.trace(model, example)


def tuned(seed: int = 0, drops: bool = True) -> pg.Program:
    base = traced(drops)
    torch.manual_seed(seed)
    return zoo.randomise(base.apply(LoRA(rank=2, alpha=4.0)))


def with_peft(program: pg.Program) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    theirs: Any = peft.get_peft_model(zoo.build("llama", dtype=torch.float64), config)
    with torch.no_grad():
        for name, ours in program.table.trainable.items():
            theirs.get_parameter(their(name)).copy_(ours)
    return theirs


def their(name: str) -> str:
    return f"base_model.model.{name}.default.weight"


def trainer(net: Any, where: Path, data: list[Row] | None = None, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(where), use_cpu=True, max_steps=4, learning_rate=0.02, logging_steps=1, report_to=[], disable_tqdm=True,
        **{"per_device_train_batch_size": 2, "save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(net, arguments, train_dataset=rows() if data is None else data)


def losses(one: Trainer) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


# The Trainer sums losses in float32, so that weights are the sharper evidence.
OPTIONS: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "plain": ({}, torch.float64, 1e-6),
    "accumulation": ({"gradient_accumulation_steps": 3}, torch.float64, 1e-6),
    "smoothing": ({"label_smoothing_factor": 0.1}, torch.float64, 1e-6),
    "bf16": ({"bf16": True}, torch.float32, 3e-3),
}


CHECKPOINTS = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)


def test_blocks_that_are_computed_again_end_at_the_same_bits(tmp_path: Path) -> None:
    plain, again = tuned(drops=False), tuned(drops=False)
    trainer(plain.module(), tmp_path).train()
    one = trainer(again.module(), tmp_path, **{CHECKPOINTS: True, f"{CHECKPOINTS}_kwargs": {"use_reentrant": False}})
    one.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in one.model.modules())
    for name, expected in plain.table.trainable.items():
        assert torch.equal(again.table.trainable[name], expected), name


def test_texts_of_different_lengths_are_padded_by_a_collator(tmp_path: Path) -> None:
    """What a batch pads changes no gradient: batches of one example, accumulated, end where batches of two do."""
    ragged = [{name: value[: 3 + i % 4] for name, value in row.items()} for i, row in enumerate(rows()) if i % 6 < 3]
    ends = []
    for size in (2, 1):
        program = tuned(drops=False)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2 // size}
        one = trainer(program.module(), tmp_path, ragged, **options)
        one.data_collator = pad
        one.train()
        ends.append(program.table.trainable)
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=1e-8, atol=1e-10)


def pad(batch: list[Row]) -> Row:
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_training_curves_are_peft_s(option: str, tmp_path: Path) -> None:
    options, dtype, tolerance = OPTIONS[option]
    program = tuned()
    both = []
    for net in (with_peft(program), program.module()):  # each seeds what is drawn for it
        both.append(trainer(net.to(dtype), tmp_path, **options))
        both[-1].train()
    expected, found = (losses(one) for one in both)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=tolerance)
    if dtype == torch.float64:
        for name, ours in program.table.trainable.items():
            torch.testing.assert_close(ours, both[0].model.get_parameter(their(name)), rtol=1e-8, atol=1e-10)


def test_a_resumed_run_ends_at_the_same_bits_and_writes_the_adapter(tmp_path: Path) -> None:
    whole, half = tuned(), tuned()
    options = {"save_strategy": "steps", "save_steps": 2}
    one = trainer(whole.module(), tmp_path / "whole")
    one.train()
    trainer(half.module(), tmp_path / "half", **options).train()
    assert len(list((tmp_path / "half" / "checkpoint-2").glob("*.safetensors"))) == 1, "the adapter, once"
    again = tuned(seed=1)
    one = trainer(again.module(), tmp_path / "half")
    one.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for name, expected in whole.table.trainable.items():
        assert torch.equal(again.table.trainable[name], expected), name
    one.save_model(str(tmp_path / "adapter"))
    loaded = traced().load_adapter(tmp_path / "adapter")
    for name, expected in whole.table.trainable.items():
        assert torch.equal(loaded.table.trainable[name], expected), name


def test_evaluation_with_and_without_labels(tmp_path: Path) -> None:
    program = tuned()
    net, theirs = program.module(), with_peft(program)
    both = [trainer(one, tmp_path, per_device_eval_batch_size=4) for one in (net, theirs)]
    ours, expected = (one.evaluate(rows(5))["eval_loss"] for one in both)
    assert ours == pytest.approx(expected, rel=1e-12)
    ours, expected = (torch.from_numpy(one.predict(rows(5, labels=False)).predictions) for one in both)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
