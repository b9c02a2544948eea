"""What a step costs, computed without values, is what a real step saves and multiplies; the comparison's table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.costs.in_context import in_context_operations, training_operations
from peftgraph.costs.measure import FORMULAS, inference, training_step
from peftgraph.passes import IA3, BitFit, DiffPruning, DoRA, LoRA, Pfeiffer, Prefix, Train

BATCH, LENGTH = 3, 7
METHODS: list[Pass] = [LoRA(rank=2, dropout=0.1), IA3(), Prefix(length=3, hidden=None), DiffPruning()]


def real(tuned: pg.Program, inputs: dict[str, Any]) -> tuple[int, int]:
    """The bytes that a real step saves, and its operations."""
    net = tuned.module().train()
    known = [*net.parameters(), *net.buffers(), *(one for one in inputs.values() if isinstance(one, Tensor))]
    seen = {one.untyped_storage()._cdata for one in known}
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage()._cdata not in seen:
            seen.add(value.untyped_storage()._cdata)
            kept.append(value)
        return value

    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            leaves = [one for one in zoo.leaves(net(**inputs)) if one.requires_grad]
        torch.autograd.backward(leaves, [torch.ones_like(one) for one in leaves])
    return sum(one.untyped_storage().nbytes() for one in kept), counter.get_total_flops()


@pytest.mark.parametrize("name", ["nano", "bert", "llama", "vit", "mixtral"])
def test_a_step_costs_what_is_computed(name: str) -> None:
    for method in METHODS:
        tuned = zoo.traced(name).apply(method)
        found = training_step(tuned, BATCH, LENGTH)
        assert (found.saved, found.forward + found.backward) == real(tuned, zoo.example(name, BATCH, LENGTH)), method


def test_less_is_saved_and_computed_below_the_lowest_trained_part() -> None:
    base = zoo.traced("bert")
    all_blocks, last = (
        training_step(base.apply(one), 2, 9) for one in (LoRA(rank=2), LoRA(at="attention.q&layers(-1)", rank=2))
    )
    assert last.saved < all_blocks.saved / 2
    assert last.backward < all_blocks.backward / 2
    assert inference(base, 2, 9).forward == inference(pg.fold(base.apply(LoRA(rank=2))), 2, 9).forward


def test_sizes_that_the_model_does_not_take() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.up = nn.Parameter(torch.zeros(6, 4)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x + self.positions[: x.shape[1]])

    program = pg.trace(Fixed(), (torch.zeros(2, 5, 4),))
    assert inference(program, 2, 6).forward > 0
    with pytest.raises(pg.PeftGraphError, match="takes no batch of 2 x 9|is 1 to 6, got 9"):
        inference(program, 2, 9)


@pytest.fixture(scope="module")
def compared() -> Any:
    return pg.compare(
        zoo.traced("bert"),
        ["ia3", "lora{rank=2}", DoRA(rank=2), BitFit(), Train(top=1), Pfeiffer(width=2), DiffPruning(target=0.01)],
        batch=2,
        length=9,
    )


def test_the_table_has_the_columns_of_the_survey(compared: Any) -> None:
    lora, dora, adapter, top = (
        compared[name] for name in ("lora{rank=2}", str(DoRA(rank=2)), str(Pfeiffer(width=2)), str(Train(top=1)))
    )
    count = zoo.traced("bert").apply(LoRA(rank=2)).count()
    assert (lora.trainable, lora.changed, lora.rank) == (count.trainable, count.changed, 2)
    assert lora.adapter_file == lora.gradients == 4 * lora.trainable == lora.optimiser // 2
    assert lora.training_memory == lora.weights + lora.gradients + lora.optimiser + lora.activations
    assert lora.folds
    assert lora.folded_operations == compared.base.forward < lora.inference_operations
    assert not adapter.folds
    assert adapter.folded_operations == adapter.inference_operations
    assert (lora.mixed_batches, adapter.mixed_batches, dora.mixed_batches, top.mixed_batches) == (
        True,
        True,
        False,
        False,
    )
    assert (lora.backward_blocks, top.backward_blocks, lora.blocks) == (2, 1, 2)
    sparse = compared[str(DiffPruning(target=0.01))]
    assert sparse.changed < 0.011 * sparse.trainable / 2
    assert sparse.adapter_file < 0.01 * sparse.gradients


def test_it_prints_and_reads_as_json_and_html(compared: Any) -> None:
    lines = str(compared).splitlines()
    assert lines[0] == "BertModel: what methods cost"
    assert lines[3].split()[:2] == ["recipe", "trainable"]
    assert len({len(line) for line in lines[3:]}) == 1
    document = json.loads(compared.json())
    assert [one["recipe"] for one in document["recipes"]][:2] == ["ia3", "lora{rank=2}"]
    assert document["recipes"][0]["training_memory"] == compared["ia3"].training_memory
    page = compared.html()
    assert page.count("<rect") == 4 * 7 + 4
    assert "lora{rank=2}" in page
    assert "<svg" in compared._repr_html_()


def test_what_a_comparison_refuses() -> None:
    with pytest.raises(pg.PeftGraphError, match="starts from a program without passes"):
        pg.compare(zoo.traced("nano").apply(IA3()), ["lora"])
    with pytest.raises(pg.RecipeError, match="no pass 'lorra'. Did you mean 'lora'"):
        pg.compare(zoo.traced("nano"), ["lorra"])


def test_examples_in_a_prompt_are_told_beside() -> None:
    found = pg.compare(zoo.traced("nano"), ["lora"], batch=2, length=9, examples=4)
    parameters = zoo.traced("nano").count().total
    assert found.in_context is not None
    assert found.in_context.operations == 2 * parameters * (4 * 9 + 9)
    assert "in context, 4 examples of 9 tokens: " in str(found)
    assert json.loads(found.json())["in_context"]["examples"] == 4
    seq2seq = pg.compare(zoo.traced("t5"), ["ia3"], batch=2, length=9, examples=1).in_context
    assert seq2seq is not None
    assert seq2seq.operations == zoo.traced("t5").count().total * 18


def test_t_fews_comparison_with_learning_in_context() -> None:
    """Training T0-11B costs about as much as 20 predictions of GPT-3 with examples (T-Few, section 4.2)."""
    trained = training_operations(11_000_000_000, 1000, 8, 103, encoder_decoder=True)
    asked = in_context_operations(175_000_000_000, 41, 98, 103)
    assert trained == pytest.approx(2.7e16, rel=0.01)
    assert asked == pytest.approx(1.4e15, rel=0.04)
    assert round(trained / asked) in (19, 20)
    assert in_context_operations(11_000_000_000, 0, 1, 103, encoder_decoder=True) == pytest.approx(1.1e12, rel=0.04)
    with pytest.raises(pg.PeftGraphError, match="at least 0"):
        in_context_operations(1, -1, 1, 1)
    with pytest.raises(pg.PeftGraphError, match="at least 1"):
        training_operations(0, 1, 1, 1)
