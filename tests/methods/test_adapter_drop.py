"""AdapterDrop: a fixed depth, one random depth a step under train(), all adapters under eval()."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, AdapterDrop, Compacter, Houlsby, LoRA, ParallelAdapter, Pfeiffer

F64 = torch.float64
LAYERS = 3
INPUTS = {"idx": torch.arange(14).view(2, 7)}


@cache
def base() -> pg.Program:
    """Three blocks without dropout, so that training draws nothing but the depth."""
    torch.manual_seed(0)
    model = zoo.Nano(layers=LAYERS).double()
    for block in model.stack:
        block.drop.p = 0.0
    return pg.trace(model, INPUTS)


def answer(program: pg.Program, training: bool = False) -> Tensor:
    return program.module().train(training)(**INPUTS)["logits"]


def at_depth(program: pg.Program, method: Pass, n: int) -> pg.Program:
    """The same adapters without the lowest n blocks' ones."""
    fixed = base().apply(AdapterDrop(adapter=method, layers=n)) if n else None
    if fixed is None:
        return program
    with torch.no_grad():
        for name, parameter in fixed.table.trainable.items():
            parameter.copy_(program.table.trainable[name])
    return fixed


@pytest.mark.parametrize("method", [Pfeiffer(width=3), Houlsby(width=3, norms=False), ParallelAdapter(width=3)])
def test_training_draws_one_depth_for_the_whole_model(method: Pass) -> None:
    tuned = zoo.randomise(base().apply(AdapterDrop(adapter=method, random=True)), 0.3)
    depths = [answer(at_depth(tuned, method, n)).detach() for n in range(LAYERS)]
    seen = set()
    for _ in range(40):
        output = answer(tuned, training=True).detach()
        distances = [float((output - depth).abs().max()) for depth in depths]
        nearest = min(range(LAYERS), key=distances.__getitem__)
        assert distances[nearest] < 1e-12
        assert sorted(distances)[1] > 1e-3
        seen.add(nearest)
    assert seen == {0, 1, 2}


def test_under_eval_it_is_the_plain_adapter() -> None:
    tuned = zoo.randomise(base().apply(AdapterDrop(adapter=Pfeiffer(width=3), random=True)), 0.3)
    whole = base().apply(Pfeiffer(width=3))
    with torch.no_grad():
        for ours, theirs in zip(tuned.table.trainable.values(), whole.table.trainable.values(), strict=True):
            theirs.copy_(ours)
    assert torch.equal(answer(tuned), answer(whole))


def test_a_dropped_block_gets_no_gradient_at_that_step() -> None:
    tuned = zoo.randomise(base().apply(AdapterDrop(adapter=Pfeiffer(width=3), random=True)), 0.3)
    reached = []
    for _ in range(40):
        answer(tuned, training=True).square().sum().backward()
        norms = {name: float(p.grad.abs().sum()) for name, p in tuned.table.trainable.items() if p.grad is not None}
        reached.append(tuple(norms[f"stack.{i}.ffn_adapter_drop.up_bias"] > 0 for i in range(LAYERS)))
        for parameter in tuned.table.trainable.values():
            parameter.grad = None
    assert set(reached) == {(True, True, True), (False, True, True), (False, False, True)}


def test_a_fixed_depth_keeps_the_upper_blocks_and_every_norm() -> None:
    tuned = base().apply(AdapterDrop(adapter=Houlsby(width=3), layers=2))
    assert {edit.site for edit in tuned.edits if edit.moves} == {"2.attention", "2.ffn"}
    assert sum(".weight" in name for name in tuned.table.trainable) == 2 * LAYERS + 1


def test_both_stacks_drop_their_own_lowest_blocks() -> None:
    tuned = zoo.traced("t5").apply(AdapterDrop(adapter=Pfeiffer(width=3), layers=1))
    assert {edit.site for edit in tuned.edits} == {"encoder.1.ffn", "decoder.1.ffn"}
    text = zoo.traced("t5").apply(AdapterDrop(adapter=Pfeiffer(width=3), random=True)).text()
    assert text.count("= randint(") == 2


def test_one_draw_whatever_the_number_of_sites() -> None:
    text = base().apply(AdapterDrop(adapter=Compacter(width=4), random=True, layers=1)).text()
    assert text.count("= randint(1, 3, [1]") == 1
    assert text.count("= le(") == 4


def test_folding() -> None:
    fixed = zoo.randomise(base().apply(AdapterDrop(adapter=LoRA(rank=2), layers=1)))
    folded = pg.fold(fixed)
    assert float((answer(folded) - answer(fixed)).detach().abs().max()) < 1e-12
    untouched = "stack.0.mix.weight"
    assert folded.table[untouched].tensor is base().table[untouched].tensor
    with pytest.raises(pg.NoFold, match="its depth is random at every training step"):
        pg.fold(base().apply(AdapterDrop(adapter=LoRA(rank=2), random=True)))


def test_removing_restores_the_text() -> None:
    tuned = base().apply(AdapterDrop(adapter=Compacter(width=4), random=True))
    assert tuned.remove().text() == base().text()
    assert tuned.remove().table.hashes() == base().table.hashes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterDrop(adapter=Pfeiffer()), "it drops nothing; give layers=... or random=true"),
        (lambda: AdapterDrop(adapter=Pfeiffer(), layers=-1), "layers must be at least 0, got -1"),
        (lambda: AdapterDrop(adapter=Pfeiffer(name="a"), layers=1), "give the name to adapter_drop"),
        (lambda: AdapterDrop(adapter=pg.Pipeline([Pfeiffer()]), layers=1), "it takes one method, not several"),
        (lambda: base().apply(AdapterDrop(adapter=IA3(), random=True)), "random=true needs a method that adds"),
        (
            lambda: base().apply(AdapterDrop(adapter=LoRA(at="head", rank=1), random=True)),
            "head is in no block, so it has no depth to be dropped at",
        ),
        (lambda: base().apply(AdapterDrop(adapter=Pfeiffer(), layers=LAYERS)), "removed them all: layers 0 to 2"),
    ],
)
def test_it_refuses(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(pg.PeftGraphError, match=message):
        make()


def test_spec_round_trip() -> None:
    for inner in (Pfeiffer(width=7), Compacter(rank=None, shared=False), LoRA(at="attention.*", rank=3)):
        method = AdapterDrop(adapter=inner, layers=2, random=True, name="a")
        assert pg.parse_pass(str(method)) == method
