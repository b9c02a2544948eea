"""The laws on models and recipes that hypothesis draws: widths, heads, depths, ranks, selectors."""

from __future__ import annotations

import tempfile

import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, LoRA, SerialAdapter

F64 = torch.float64
SLOW = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WORDS = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.down")


@st.composite
def models(draw: st.DrawFn) -> pg.Program:
    heads = draw(st.integers(1, 4))
    width = heads * draw(st.integers(2, 6))
    layers = draw(st.integers(1, 3))
    attn = draw(st.sampled_from(zoo.ATTENTIONS))
    torch.manual_seed(draw(st.integers(0, 99)))
    model = zoo.Nano(width, heads, draw(st.integers(5, 30)), layers, attn).to(F64)
    return pg.trace(model, zoo.example("nano"))


@st.composite
def selectors(draw: st.DrawFn) -> pg.Selector:
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True))
    selector = pg.parse_selector("|".join(words))
    return selector & pg.layers(0) if draw(st.booleans()) else selector


@st.composite
def methods(draw: st.DrawFn) -> pg.Pass:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return LoRA(
            at=draw(selectors()),
            rank=draw(st.integers(1, 2)),
            alpha=draw(st.floats(0.1, 32)),
            name=draw(st.sampled_from(["", "a", "b"])),
        )
    if kind == 1:
        return IA3(at=draw(selectors()) | pg.ffn.hidden)
    if kind == 2:
        return BitFit(at=pg.bias if draw(st.booleans()) else pg.bias & pg.layers(0))
    return SerialAdapter(
        at=draw(st.sampled_from([pg.attention, pg.ffn, pg.attention | pg.ffn])), width=draw(st.integers(1, 4))
    )


def outputs(program: pg.Program, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return program.module().eval()(**inputs)["logits"]


@SLOW
@given(models(), st.lists(methods(), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 9))
def test_every_law_on_a_drawn_recipe(base: pg.Program, recipe: list[pg.Pass], batch: int, length: int) -> None:
    text, hashes, inputs = base.text(), base.table.hashes(), zoo.example("nano", batch, length)
    try:
        program = base.apply(*recipe)
    except pg.Conflict as error:  # drawn recipes may put one method on one site twice
        assert "exists already" in str(error) or "both train" in str(error) or "already a" in str(error)
        return
    assert torch.equal(outputs(base, inputs), outputs(program, inputs))
    zoo.randomise(program)
    folded = pg.fold(program, partial=True)
    want, got = outputs(program, inputs), outputs(folded, inputs)
    assert float((want - got).abs().max()) < 1e-12 * float(want.abs().max())
    if not any(isinstance(method, SerialAdapter) for method in recipe):
        assert folded.text() == text
    with tempfile.TemporaryDirectory() as folder:
        assert base.load_adapter(program.save_adapter(folder)).table.hashes() == program.table.hashes()
    while program.history:
        program = program.remove()
    assert (program.text(), program.table.hashes()) == (text, hashes) == (base.text(), base.table.hashes())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(methods(), min_size=1, max_size=4))
def test_drawn_recipes_print_and_parse(recipe: list[pg.Pass]) -> None:
    text = "\n".join(map(str, recipe))
    assert list(pg.parse_pass(text).passes()) == recipe
