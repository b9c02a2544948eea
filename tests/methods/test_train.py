"""Partial fine-tuning: which parameters train, their gradients, where the backward pass stops, published sizes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftgraph as pg
from peftgraph.passes import Train

F64 = torch.float64


def test_equation(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(Train(top=1)), 0.1)
    reference = bench.plain()
    same = {name: p for name, p in reference.named_parameters() if name.startswith("stack.0.")}
    assert len(same) == 12
    for parameter in same.values():
        parameter.requires_grad_(True)
    bench.agree(tuned, reference, same)


# how the parameters of the uppermost block are named, for the test alone
LAST = {
    "bert": "encoder.layer.1.",
    "llama": "model.layers.1.",
    "gpt2": "transformer.h.1.",
    "gpt_neox": "gpt_neox.layers.1.",
    "vit": "vit.layers.1.",
    "mixtral": "model.layers.1.",
    "nano": "stack.1.",
}


@pytest.mark.parametrize("name", LAST)
def test_a_block_trains_whole(name: str) -> None:
    base = zoo.traced(name)
    own = {key for key, entry in base.table.items() if entry.kind == "parameter" and key.startswith(LAST[name])}
    tuned = zoo.randomise(base.apply(Train(top=1)))
    assert set(tuned.table.trainable) == own
    folded = pg.fold(tuned)
    assert folded.text() == base.text()
    assert {key for key in own if folded.table[key].tensor is not base.table[key].tensor} == own
    assert tuned.remove().table.hashes() == base.table.hashes()


def test_two_stacks_have_to_be_told_apart() -> None:
    base = zoo.traced("t5")
    with pytest.raises(pg.Ambiguous):
        base.apply(Train(top=1))
    upper = base.apply(Train(at=~pg.block & pg.stack("decoder"), top=1))
    assert all(name.startswith("decoder.block.1.") for name in upper.table.trainable)


def saved(program: pg.Program, inputs: dict[str, Tensor]) -> int:
    """The bytes that a forward pass keeps for the backward pass, apart from stored parameters."""
    stored = {entry.tensor.untyped_storage().data_ptr() for entry in program.table.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = program.module().eval()(**inputs)["logits"]
    assert output.requires_grad
    return sum(kept.values())


def test_nothing_is_kept_below_the_lowest_block_that_trains() -> None:
    torch.manual_seed(0)
    model, inputs = zoo.Nano(layers=6), zoo.example("nano")
    base = pg.trace(model, inputs)
    sizes = [saved(base.apply(Train(top=top)), inputs) for top in range(1, 7)]
    steps = [after - before for before, after in pairwise(sizes)]
    assert len(set(steps)) == 1, sizes  # a block more costs what a block costs, however many lie below
    assert 0 < sizes[0] < sizes[-1] / 3


def test_the_lower_blocks_run_without_gradients() -> None:
    base, inputs = zoo.traced("nano"), zoo.example("nano")
    net = base.apply(Train(top=1)).module()
    net(**inputs)["logits"].sum().backward()
    with_gradient = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name in base.table if name.startswith("stack.1.")}


def test_published_sizes(real: Any) -> None:
    # two blocks of 12 d^2 + 13 d; one layer is traced
    assert 2 * real("gpt2-medium").apply(Train(top=1)).count().trainable == 25_192_448
    assert real("bert-base").apply(Train(at=pg.norm)).count().trainable == 2 * 768 * 25 == 38_400
    one = real("t5-xl").apply(Train(at=pg.norm)).count().trainable
    assert 24 * (one - 2 * 2048) + 2 * 2048 == 122 * 2048 == 249_856


def test_the_head_trains_beside(bench: Any) -> None:
    tuned = bench.program.apply(Train(at=pg.norm, head=True))
    assert {"vocab.weight", "last.weight"} < set(tuned.table.trainable)
    assert "stack.0.fc.weight" not in tuned.table.trainable


def test_no_block_at_all_is_refused() -> None:
    with pytest.raises(pg.RecipeError, match="train: top must be at least 1 or none, got 0"):
        Train(top=0)


@settings(max_examples=20)
@given(
    at=st.sampled_from(["~block", "norm", "attention.*|bias"]),
    top=st.one_of(st.none(), st.integers(1, 99)),
    head=st.booleans(),
)
def test_spec_round_trip(**options: Any) -> None:
    method = Train(**options)
    assert pg.parse_pass(str(method)) == method
