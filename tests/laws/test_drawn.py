"""The laws on compositions that hypothesis draws: two to four methods of all there are, with their sites and sizes, on
models of the library and on hand-written ones of drawn widths, heads and depths."""

from __future__ import annotations

import laws
import torch
import zoo
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import peftgraph as pg
from peftgraph import passes
from peftgraph.authoring import Pass
from peftgraph.testing.laws import LAWS
from peftgraph.testing.subject import Base, Subject

F64 = torch.float64
SLOW = settings(  # an example takes seconds: a failing one is shown as it was drawn
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.generate,)
)
WORDS = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.down")
SMALL = st.integers(1, 4)
NAMES = st.sampled_from(["", "a", "b"])
SUBLAYERS = st.sampled_from([pg.attention, pg.ffn, pg.attention | pg.ffn])


@st.composite
def selectors(draw: st.DrawFn) -> pg.Selector:
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True))
    selector = pg.parse_selector("|".join(words))
    return selector & pg.layers(0) if draw(st.booleans()) else selector


RANKS = {"at": selectors(), "rank": st.integers(1, 2), "alpha": st.floats(0.1, 32), "name": NAMES}
WIDE = {"at": SUBLAYERS, "width": SMALL, "name": NAMES}
BIASES = st.sampled_from([pg.bias, pg.bias & pg.layers(0)])
GATED = (passes.LoRA(rank=1, alpha=1.0), passes.Prefix(length=2, hidden=3), passes.SerialAdapter(width=2))
AWAY = (
    passes.LadderSide | passes.Prefix | passes.Prompt | passes.PTuning | passes.UniPELT | passes.Quantise | passes.QLoRA
)
DRAWN: dict[type[Pass], st.SearchStrategy[Pass]] = {
    passes.LoRA: st.builds(passes.LoRA, **RANKS, init=st.sampled_from(["kaiming", "pissa", "olora"])),
    passes.AdaLoRA: st.builds(
        passes.AdaLoRA, at=selectors(), rank=st.just(2), target_rank=st.integers(1, 2), name=NAMES
    ),
    passes.QLoRA: st.builds(
        passes.QLoRA,
        at=st.sampled_from([pg.ffn.up, pg.ffn.down]),
        rank=st.just(1),
        compute=st.just("stored"),
        name=NAMES,
    ),
    passes.DiffPruning: st.builds(passes.DiffPruning, at=selectors(), structured=st.booleans(), name=NAMES),
    passes.IntrinsicSAID: st.builds(
        passes.IntrinsicSAID, at=selectors(), dimension=st.integers(40, 60), layer_scales=st.booleans(), name=NAMES
    ),
    passes.DoRA: st.builds(passes.DoRA, **RANKS),
    passes.IA3: st.builds(passes.IA3, at=selectors().map(lambda at: at | pg.ffn.hidden), name=NAMES),
    passes.BitFit: st.builds(passes.BitFit, at=BIASES),
    passes.Train: st.builds(passes.Train, at=selectors()),
    passes.Quantise: st.builds(
        passes.Quantise,
        at=st.sampled_from([pg.ffn.up, pg.ffn.down, pg.parse_selector("attention.*")]),
        format=st.sampled_from(["nf4", "int8"]),
        compute=st.just("stored"),
        name=NAMES,
    ),
    passes.TrainableTokens: st.builds(
        passes.TrainableTokens, tokens=st.lists(st.integers(0, 60), min_size=40, unique=True).map(tuple), name=NAMES
    ),
    passes.SerialAdapter: st.builds(passes.SerialAdapter, **WIDE),
    passes.Houlsby: st.builds(passes.Houlsby, **WIDE, norms=st.booleans()),
    passes.Pfeiffer: st.builds(passes.Pfeiffer, width=SMALL, name=NAMES),
    passes.AdapterPlus: st.builds(passes.AdapterPlus, width=SMALL, drop_path=st.floats(0, 0.9), name=NAMES),
    passes.ParallelAdapter: st.builds(passes.ParallelAdapter, **WIDE, learned=st.booleans()),
    passes.Compacter: st.builds(passes.Compacter, width=st.just(4), n=st.just(2), norms=st.booleans(), name=NAMES),
    passes.CompacterPP: st.builds(passes.CompacterPP, width=st.just(2), n=st.just(2), norms=st.just(False)),
    passes.AdapterDrop: st.builds(
        passes.AdapterDrop, adapter=st.builds(passes.Pfeiffer, width=SMALL), random=st.just(True), name=NAMES
    ),
    passes.AdapterFusion: st.builds(passes.AdapterFusion, adapters=st.just(("a", "b")), width=SMALL, name=NAMES),
    passes.CIAT: st.builds(passes.CIAT, width=SMALL, embedding_width=SMALL, init=st.just("identity"), name=NAMES),
    passes.Invertible: st.builds(
        passes.Invertible, reduction=st.floats(0.4, 1.0), init=st.just("identity"), name=NAMES
    ),
    passes.LadderSide: st.builds(
        passes.LadderSide, reduction=st.just(2), init=st.sampled_from(["prune", "random"]), name=NAMES
    ),
    passes.LoReFT: st.builds(
        passes.LoReFT, rank=st.just(1), prefix=st.integers(0, 3), suffix=SMALL, start=st.just("identity"), name=NAMES
    ),
    passes.Prompt: st.builds(passes.Prompt, length=SMALL, name=NAMES),
    passes.PTuning: st.builds(
        passes.PTuning, length=SMALL, encoder=st.sampled_from(["lstm", "mlp", "none"]), hidden=SMALL, name=NAMES
    ),
    passes.ZeroInitPrefix: st.builds(passes.ZeroInitPrefix, length=SMALL, tanh=st.booleans(), name=NAMES),
    passes.MAM: st.builds(passes.MAM, length=SMALL, hidden=st.none() | SMALL, width=SMALL, name=NAMES),
    passes.UniPELT: st.builds(
        passes.UniPELT, methods=st.just(GATED), gates=st.sampled_from(["method", "site", "shared"]), name=NAMES
    ),
    passes.Prefix: st.builds(passes.Prefix, length=SMALL, hidden=st.none() | SMALL, name=NAMES),
}
RECIPES = st.lists(st.sampled_from(list(DRAWN)), min_size=2, max_size=4).flatmap(
    lambda kinds: st.tuples(*(DRAWN[kind] for kind in kinds))
)
NEAR = ("up_weight", "up_right")


@st.composite
def bases(draw: st.DrawFn) -> Base:
    known = draw(st.sampled_from(["", "", "clip_text", "falcon", "gpt2"]))
    if known:
        return laws.base_of(known)
    heads, attn = draw(st.integers(1, 4)), draw(st.sampled_from(zoo.ATTENTIONS))
    torch.manual_seed(draw(st.integers(0, 99)))
    sizes = (heads * 2 * draw(st.integers(1, 3)), heads, draw(st.integers(5, 30)), draw(st.integers(1, 3)))
    program = pg.trace(zoo.Nano(*sizes, attn).to(F64), zoo.example("nano"))
    length = draw(st.integers(2, 9))  # over a single token, queries and keys decide nothing and do not train
    return Base.of("nano", program, zoo.example("nano", draw(SMALL), length))


def composed(base: Base, recipe: tuple[Pass, ...]) -> pg.Program:
    """The recipe without those of its passes that conflict with earlier ones, or with themselves, which they must say
    clearly."""
    program = base.program
    for method in recipe:
        try:
            program = program.apply(method)
        except pg.Conflict as error:
            words = str(error)
            assert any(str(part) in words for part in method.passes()), words
            itself = any(words.count(str(part)) > 1 for part in method.passes())
            assert itself or any(str(applied.method) in words for applied in program.history), words
            assert any(site.id in words for site in base.program.sites), words
    return program


@SLOW
@given(bases(), RECIPES, st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_every_law_on_a_drawn_composition(base: Base, recipe: tuple[Pass, ...], order: list[int]) -> None:
    torch.manual_seed(0)
    program = composed(base, recipe)
    methods = tuple(applied.method for applied in program.history)
    subject = Subject(base, methods, NEAR, any(isinstance(one, AWAY) for one in methods), None, 1e-12, program)
    for law in ("identity", "fold", "counts", "files", "training"):
        LAWS[law](subject)
    for which in order:
        if program.history:
            program = program.remove(which % len(program.history))
    while program.history:  # a pass may stand for several
        program = program.remove()
    assert program.text() == base.text
    assert program.table.hashes() == base.hashes


NEEDS_BATCH_NORMS = {passes.FreezeStatistics}  # no model here has one: tests/rewrite/test_state.py has its laws


def test_every_pass_is_drawn() -> None:
    known = {one for one in vars(passes).values() if isinstance(one, type) and issubclass(one, Pass)}
    assert set(DRAWN) == known - NEEDS_BATCH_NORMS


@settings(max_examples=200, deadline=None, derandomize=True)
@given(RECIPES)
def test_drawn_recipes_print_and_parse(recipe: tuple[Pass, ...]) -> None:
    text = "\n".join(map(str, recipe))
    assert pg.parse_pass(text).passes() == pg.Pipeline(recipe).passes()
