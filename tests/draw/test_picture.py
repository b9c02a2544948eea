"""Pictures of rewritten blocks: what was inserted is drawn once, where it enters, and nothing lies on anything else."""

from __future__ import annotations

import doctest
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from xml.etree import ElementTree

import pytest
import torch
import zoo
from gated_attention import WIDTH, GatedAttention
from stacked import convolutions
from torch import fx, nn

import peftgraph as pg
import peftgraph.authoring as pga
import peftgraph.authoring.modules
from peftgraph.draw import formulas
from peftgraph.passes import (
    CIAT,
    IA3,
    MAM,
    AdapterDrop,
    AdapterFusion,
    AdapterPlus,
    BitFit,
    Compacter,
    DoRA,
    Houlsby,
    Invertible,
    LoRA,
    LoReFT,
    ParallelAdapter,
    Pfeiffer,
    Prefix,
    Prompt,
    Train,
    TrainableTokens,
    UniPELT,
    ZeroInitPrefix,
)

SVG = "{http://www.w3.org/2000/svg}"
SPAN = tuple[float, float, float, float]

METHODS: dict[str, pga.Pass] = {
    "lora": LoRA(rank=4),
    "pissa": LoRA(rank=4, init="pissa"),
    "every lora": LoRA(at="attention.*|ffn.*", rank=4),
    "dora": DoRA(at="attention.k|ffn.down", rank=4),
    "ia3": IA3(),
    "bitfit": BitFit(zero=True),
    "train": Train(top=1),
    "tokens": TrainableTokens(tokens=(3, 5)),
    "houlsby": Houlsby(width=16),
    "pfeiffer": Pfeiffer(width=16),
    "plus": AdapterPlus(width=16),
    "parallel": ParallelAdapter(width=16, learned=True),
    "parallel heads": ParallelAdapter(at="attention.o", width=16, layer_norm=True),
    "compacter": Compacter(),
    "drop": AdapterDrop(adapter=Houlsby(width=16), layers=1),
    "random depth": AdapterDrop(adapter=Houlsby(width=16), random=True),
    "fusion": AdapterFusion(adapters=("one", "two"), width=16),
    "ciat": CIAT(width=16, embedding_width=16),
    "invertible": Invertible(),
    "prefix": Prefix(hidden=8),
    "unipelt": UniPELT(),
    "mam": MAM(length=4, hidden=8, width=16),
    "zero-initialised prefix": ZeroInitPrefix(),
    "prompt": Prompt(length=5),
    "reft": LoReFT(rank=4),
    "embedding": LoRA(at="embedding", rank=4),
    "pipeline": pg.Pipeline([LoRA(at="attention.*|ffn.*", rank=4), IA3(), ParallelAdapter(width=16), Prefix()]),
}  # fmt: skip
OTHERS = {
    "gpt2": ("dora", "prefix", "compacter"),
    "t5": ("pipeline", "ciat"),
    "llama": ("every lora", "fusion"),
    "gpt_neox": ("parallel", "parallel heads"),
    "mixtral": ("every lora", "ia3"),
}
DRAWN = [("bert", method) for method in METHODS] + [(model, method) for model in OTHERS for method in OTHERS[model]]


@dataclass
class Drawing:
    """A picture as it is read back."""

    root: ElementTree.Element

    @classmethod
    def of(cls, program: pg.Program, **options: object) -> Drawing:
        return cls(ElementTree.fromstring(program.picture(**options).svg))  # pyright: ignore[reportArgumentType]

    def groups(self, kind: str) -> list[ElementTree.Element]:
        return [group for group in self.root.iter(f"{SVG}g") if kind in group.get("class", "").split()]

    def labels(self, kind: str) -> Counter[str]:
        """The labels of the boxes of a kind, with what is inside of them."""
        texts = [[("".join(t.itertext())) for t in group.iter(f"{SVG}text")] for group in self.groups(kind)]
        return Counter(" ".join(text) for text in texts if text)

    def span(self, label: str) -> SPAN:
        """Where the one box of the base with a label is."""
        groups = [g for g in self.groups("base") if [(t.text or "") for t in g.iter(f"{SVG}text")][:1] == [label]]
        (group,) = groups
        return Drawing(group).boxes()[0][1]

    def boxes(self) -> list[tuple[str, SPAN]]:
        found: list[tuple[str, SPAN]] = []
        for group in self.root.iter(f"{SVG}g"):
            kind = group.get("class", "")
            for rect in group.findall(f"{SVG}rect"):
                x, y, w, h = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
                found.append((kind, (x, y, x + w, y + h)))
            for shape in group.findall(f"{SVG}polygon"):
                corners = [float(n) for n in re.findall(r"-?[\d.]+", shape.get("points", ""))]
                found.append((kind, (min(corners[::2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2]))))
            for circle in group.findall(f"{SVG}circle"):
                x, y = (float(n) for n in re.findall(r"-?[\d.]+", group.get("transform", "")))
                r = float(circle.get("r", "nan"))
                found.append((kind, (x - r, y - r, x + r, y + r)))
        for dot in self.root.iter(f"{SVG}circle"):
            if "dot" in dot.get("class", ""):
                x, y = float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))
                found.append(("dot", (x, y, x, y)))
        return found

    def heads(self) -> list[tuple[float, float]]:
        """The tips of all arrows but the stream's own, which leaves the block."""
        groups = [group for group in self.root.iter(f"{SVG}g") if group.get("class") != "stream"]
        heads = [path.get("d", "") for group in groups for path in group.findall(f"{SVG}path[@class='head']")]
        return [(float(x), float(y)) for x, y in (re.findall(r"-?[\d.]+", head)[:2] for head in heads)]


@cache
def tuned(model: str, method: str) -> pg.Program:
    return zoo.traced(model).apply(METHODS[method])


@pytest.mark.parametrize(("model", "method"), DRAWN)
def test_nothing_overlaps_texts_fit_and_arrows_end_at_something(model: str, method: str) -> None:
    drawing = Drawing.of(tuned(model, method), layer=1)
    width, height = float(drawing.root.get("width", 0)), float(drawing.root.get("height", 0))
    found = [(kind, span) for kind, span in drawing.boxes() if not {"card", "sheet", "bridge"} & set(kind.split())]
    boxes = [(kind, span) for kind, span in found if kind != "pile"]  # experts lie in front of each other
    for place, (kind, (left, top, right, bottom)) in enumerate(boxes):
        assert 0 <= left <= right <= width, kind
        assert 0 <= top <= bottom <= height, kind
        for other, (x0, y0, x1, y1) in boxes[:place]:
            if ("mark-of" not in kind or "base" not in other) and "dot" not in (kind, other):
                assert max(left - x1, x0 - right, top - y1, y0 - bottom) >= -0.2, (kind, other)
    for x, y in drawing.heads():
        ends = [
            min(abs(y - top), abs(y - bottom)) < 0.2 or min(abs(x - left), abs(x - right)) < 10
            for _, (left, top, right, bottom) in found
            if left - 10 <= x <= right + 10 and top - 0.2 <= y <= bottom + 0.2
        ]
        assert any(ends), (x, y)
    for group in drawing.groups("inserted"):
        for text in group.iter(f"{SVG}text"):
            (left, _, right, _) = Drawing(group).boxes()[0][1]
            assert 5.4 * len("".join(text.itertext())) <= right - left


@pytest.mark.parametrize("method", METHODS)
def test_every_new_parameter_of_a_layer_is_in_the_picture(method: str) -> None:
    program = tuned("bert", method)
    text = program.picture(layer=1).svg
    made = {name for edit in program.edits if edit.site.startswith("1.") for name in edit.parameters}
    assert made or method in ("embedding", "invertible", "prompt", "tokens")
    for name in made:
        if program.table[name].added:
            assert name in text, name


def test_low_rank_paths_stand_beside_q_and_v_with_their_own_names_and_sizes() -> None:
    drawing = Drawing.of(zoo.traced("bert").apply(LoRA(rank=8, alpha=16.0)))
    assert drawing.labels("inserted") == {"A R × D": 2, "B D × R": 2, "× 2": 2}
    assert drawing.labels("base")["k D × D"] == 1
    assert len(drawing.groups("op")) == 2 + 3  # two adds of the pass; two residual adds and the nonlinearity
    words = ["".join(text.itertext()) for text in drawing.root.iter(f"{SVG}text")]
    assert {"sizes are out × in: D 48 · F 80 · R 8", "layer 0 of 0–1"} <= set(words)
    spec = " ".join(word for word in words if word.startswith(("lora{", "init")))
    assert spec == str(LoRA(rank=8, alpha=16.0))


def test_a_weight_that_is_fused_is_one_frame_and_its_parts_touch() -> None:
    fused, apart = (Drawing.of(zoo.traced(name).apply(LoRA(rank=4))) for name in ("gpt2", "bert"))
    assert fused.labels("inserted") == apart.labels("inserted")
    (q, k, v), (q0, k0, _) = (tuple(map(drawing.span, "qkv")) for drawing in (fused, apart))
    assert abs(q[2] - k[0]) < 0.2
    assert abs(k[2] - v[0]) < 0.2
    assert q0[2] < k0[0] - 5
    assert fused.groups("bridge") == []
    every = Drawing.of(zoo.traced("gpt2").apply(LoRA(at="attention.q|attention.k|attention.v", rank=4)))
    (frame,) = every.groups("bridge")  # a path of k's own stands between k and v
    left, _, right, _ = Drawing(frame).boxes()[0][1]
    assert (left, right) == (every.span("q")[0], every.span("v")[2])


def test_a_formula_of_parameters_is_written_as_one() -> None:
    text = zoo.traced("bert").apply(DoRA(at="attention.q", rank=4, alpha=8.0)).picture().svg
    assert "× m / ‖W_q + 2 B A‖" in text
    assert "× (m / ‖W_q + 2 B A‖ − 1)" in text


def test_the_prefix_is_put_in_front_of_keys_and_values_and_its_formula_is_below() -> None:
    drawing = Drawing.of(zoo.traced("gpt2").apply(Prefix(length=5, hidden=8)))
    assert drawing.labels("inserted") == {"prefix_k L × D": 1, "prefix_v L × D": 1}
    words = ["".join(text.itertext()) for text in drawing.root.iter(f"{SVG}text")]
    assert "prefix_k = k(tanh(self_down(self_embedding)))" in words


def test_a_prefix_of_attention_that_is_written_out_enters_the_core() -> None:
    drawing = Drawing.of(zoo.traced("bert", "eager").apply(Prefix(hidden=None)))
    assert drawing.labels("inserted") == {"prefix_k L × D": 1, "× 0.3536": 1, "prefix_v L × D": 1}
    assert drawing.labels("again") == {"q": 1}


def test_what_enters_before_the_first_block_enters_the_stream_there() -> None:
    adapters = Drawing.of(zoo.traced("bert").apply(CIAT(width=16, embedding_width=16)))
    embedded, *layers = sorted(span[1] for kind, span in adapters.boxes() if kind.startswith("op p0"))
    first = min(span[1] for kind, span in adapters.boxes() if kind == "base")
    assert embedded < first < layers[0]
    prompt = Drawing.of(zoo.traced("bert").apply(Prompt(length=5)))
    assert prompt.labels("inserted") == {"prompt L × D": 1, "where": 1}
    assert prompt.labels("base")["embeddingD × 61"] == 1
    for method in (Invertible(), Prompt(length=5, onto="embeddings")):
        drawing = Drawing.of(zoo.traced("bert").apply(method))
        embedding, q, *_ = sorted(span[1] for kind, span in drawing.boxes() if kind == "base")
        made = [span for kind, span in drawing.boxes() if kind.startswith("inserted p0") and span[2] - span[0] > 20]
        assert made
        assert all(embedding < span[1] and span[3] < q for span in made)


def test_frozen_adapters_are_dashed_and_the_norm_that_is_used_twice_is_the_base_s() -> None:
    drawing = Drawing.of(zoo.traced("llama").apply(AdapterFusion(adapters=("one", "two"), width=16)))
    assert set(drawing.labels("frozen")) == {"one_down M × D", "one_up D × M", "two_down M × D", "two_up D × M"}
    assert drawing.labels("again") == {}
    assert Drawing.of(zoo.traced("bert").apply(Pfeiffer(width=16))).labels("again") == {"norm": 1}


def test_what_trains_of_the_base_is_marked() -> None:
    drawing = Drawing.of(zoo.traced("bert").apply(BitFit()), layer=1)
    assert drawing.labels("mark-of") == {"b": 10}  # q, k, v, o, up, down, two norms; the embedding's norm, the head
    top = Drawing.of(zoo.traced("bert").apply(Train(top=1)))
    assert top.labels("mark-of") == {"b": 8, "W": 6, "g": 2}
    assert "layer 1 of 0–1" in ["".join(text.itertext()) for text in top.root.iter(f"{SVG}text")]


def test_passes_have_colours_of_their_own_and_earlier_ones_may_be_left_out() -> None:
    once = zoo.traced("bert").apply(LoRA(rank=4))
    twice = once.apply(IA3())
    both, later = Drawing.of(twice), Drawing.of(twice, before=once)
    assert both.labels("p1") == later.labels("p0") == {"l D": 2, "l F": 1}
    assert set(both.labels("p0")) == {"A R × D", "B D × R", "× 4"}
    with pytest.raises(pg.PeftGraphError, match="No pass was applied in between"):
        twice.picture(before=twice)


def test_stacks_that_were_changed_are_shown_and_one_can_be_chosen() -> None:
    program = zoo.traced("t5").apply(LoRA(at='attention.q & stack("decoder") & kind("cross")', rank=4))
    (card,) = Drawing.of(program).groups("card")
    assert card is not None
    assert len(Drawing.of(zoo.traced("t5").apply(IA3())).groups("card")) == 2
    assert Drawing.of(program, stack="encoder").labels("inserted") == {}
    with pytest.raises(
        pg.PeftGraphError, match=r"There is no decoder block 7 to draw; .* encoder 2 blocks and decoder 2"
    ):
        program.picture(stack="decoder", layer=7)


class Centred(pga.Pass):
    """A user's pass, not one of ours: y -> y - mean(y) c."""

    word = "centred"

    def rules(self) -> list[pga.Rule]:
        return [pga.Rule(at=pg.attention.o, delta=self.delta, join=pga.Replace(), fold="it reads its input")]

    def delta(self, m: pga.Match, op: pga.Builder) -> fx.Node:
        mean = op.call(torch.ops.aten.mean.dim, m.output, [-1], True)
        c = op.param("centred_c", (m.features,), pga.modules.init.ones)
        return op.call(torch.ops.aten.sub.Tensor, m.output, op.mul(mean, c))


def test_any_pass_is_drawn() -> None:
    drawing = Drawing.of(zoo.traced("bert").apply(Centred()))
    assert drawing.labels("inserted") == {"mean": 1, "× c": 1, "−": 1}


def test_a_notebook_shows_diffs_sites_and_rewritten_programs() -> None:
    base = zoo.traced("nano")
    rewritten = base.apply(LoRA(rank=4))
    diff = rewritten.diff(base)
    assert isinstance(diff, str)
    assert diff.endswith("trainable values)\n")
    shown = diff._repr_html_()
    assert shown.count("<svg") == 1
    assert "<summary>" in shown
    assert "%0.attention.q.lora.linear" in shown
    assert rewritten._repr_html_().count("<svg") == 1
    assert "<svg" not in base.diff(base)._repr_html_()
    table = base.sites._repr_html_()
    assert table.count("<td>attention.q</td>") == 1  # of all layers
    assert "<td>0-1</td>" in table


def test_a_model_without_blocks_has_no_picture_and_its_diff_is_text() -> None:
    base = convolutions()
    rewritten = base.apply(Train(at="head"))
    with pytest.raises(pg.PeftGraphError, match="no blocks that were found"):
        rewritten.picture()
    assert "<svg" not in rewritten.diff(base)._repr_html_()


def test_a_picture_is_saved_as_svg_and_is_the_same_each_time(tmp_path: object) -> None:
    program = zoo.traced("nano").apply(LoRA(rank=4))
    path = program.picture().save(f"{tmp_path}/block.svg")
    assert path.read_text(encoding="utf-8") == program.picture().svg
    with pytest.raises(pg.PeftGraphError, match=r"saved as \.svg, \.pdf, \.png, got 'block.gif'"):
        program.picture().save("block.gif")


def test_formulas_and_names() -> None:
    assert doctest.testmod(formulas).failed == 0


def test_a_gate_stands_beside_q_k_and_v_and_weighs_the_result_of_the_attention() -> None:
    model = nn.Sequential(*(GatedAttention("heads", eager=False) for _ in range(2))).eval()
    program = pg.trace(model, torch.randn(2, 5, WIDTH))
    drawing = Drawing.of(program.apply(LoRA(at="attention.gate|attention.o", rank=2)), layer=1)
    assert drawing.labels("inserted") == {"A R × D": 2, "B 4 × R": 1, "B D × R": 1, "× 8": 2}
    assert drawing.labels("again") == {}  # what o reads is a station of its own, after the product
    (product,) = [group for group in drawing.groups("op") if "weighs the result" in "".join(group.itertext())]
    left, top, right, bottom = Drawing(product).boxes()[0][1]
    v, gate, core, o = map(drawing.span, ("v", "gate", "self-attention", "o"))
    assert (v[1], v[2] < gate[0]) == (gate[1], True)
    assert core[3] < top < bottom < o[1]
    assert core[0] < left < right < core[2] < gate[0]
