"""The page: every distinct block is drawn once, nothing is fetched, and nothing overlaps."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import zoo
from stacked import Blocks, blocks, convolutions, outlined

import peftgraph as pg
from peftgraph.draw import page
from peftgraph.draw.model_figure import model_figure
from peftgraph.draw.model_outline import BlockOutline, Component, LayerGroup, Outline, StackOutline, Sublayer

ROLES = ("attention-q", "attention-k", "attention-v", "attention-o", "ffn-gate", "ffn-up", "ffn-down", "router")


def drawing(found: Outline) -> ElementTree.Element:
    """The one drawing of a page; it is well-formed XML."""
    (text,) = re.findall(r"<svg class=\"figure\".*?</svg>", page(found), re.S)
    return ElementTree.fromstring(text)


def drawn(root: ElementTree.Element) -> Counter[str]:
    return Counter(group.get("class", "") for group in root.iter("g"))


def words(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter("text")]


def rectangles(root: ElementTree.Element) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """The class of every rectangle, and its left, top, right and bottom."""
    for group in root.iter("g"):
        for rect in group.findall("rect"):
            x, y, w, h = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
            yield group.get("class", ""), (x, y, x + w, y + h)


def component(role: str, shape: tuple[int, int] = (48, 48), **facts: object) -> Component:
    return Component(role=role, shape=shape, ids=(role,), **facts)  # pyright: ignore[reportArgumentType]


def block_outline(sublayers: tuple[Sublayer, ...]) -> Outline:
    """A model of three layers, without a program."""
    stack = StackOutline("", (component("embedding"),), (LayerGroup((0, 1, 2), BlockOutline(sublayers)),), ())
    return Outline(model="Special", parameters=0, nodes=0, stacks=(stack,), loose=(), unmatched=(), reasons=())


NORM = Component(role="norm", slot="pre")
QKV = tuple(component(f"attention.{part}", heads=6, head_dim=8) for part in "qkv")
GATED = (component("ffn.gate"), component("ffn.up"), component("ffn.down"))
EXPERTS = tuple(component(f"ffn.{part}", (24, 48), experts=4) for part in ("gate", "up", "down"))
LATENTS = tuple(one for _ in range(2) for one in (component("attention.latent"), Component(role="norm", slot="latent")))
OUTPUT, RESULT_GATE = component("attention.o"), component("attention.gate", (6, 48))
ROUTERS = (component("router", (4, 48)), component("router", (1, 48)))
SPECIAL = {
    "gated": (Sublayer(role="attention", components=(NORM, *QKV, RESULT_GATE, OUTPUT)),),
    "latent": (Sublayer(role="attention", components=(NORM, *LATENTS, *QKV, OUTPUT)),),
    "parallel": (
        Sublayer(role="attention", parallel=True, components=(NORM, *QKV, OUTPUT)),
        Sublayer(role="ffn", parallel=True, components=GATED),
    ),
    "shared expert": (Sublayer(role="ffn", components=(NORM, *ROUTERS, *GATED, *EXPERTS)),),
    "unknown": (Sublayer(role="other", components=tuple(component("projection", path=f"p{i}") for i in range(9))),),
}
EXPECTED = {
    "bert": (1, 1, 1, 1, 0, 1, 1, 0),
    "llama": (1, 1, 1, 1, 1, 1, 1, 0),
    "gpt2": (1, 1, 1, 1, 0, 1, 1, 0),
    "gpt_neox": (1, 1, 1, 1, 0, 1, 1, 0),
    "mixtral": (1, 1, 1, 1, 1, 1, 1, 1),
    "t5": (3, 3, 3, 3, 0, 2, 2, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_role_of_a_distinct_block_is_drawn_once(name: str) -> None:
    root = drawing(outlined(name))
    counts = drawn(root)
    assert tuple(counts[role] for role in ROLES) == EXPECTED[name]
    stacks = 2 if name == "t5" else 1
    assert words(root).count("× 2") == counts["card"] == stacks
    assert words(root).count("layers 0–1") == stacks


def test_a_block_of_many_layers_is_drawn_as_one_of_two_is() -> None:
    two, twelve = drawing(blocks([32] * 2, [None] * 2)), drawing(blocks([32] * 12, [None] * 12))
    assert drawn(two) == drawn(twelve)
    assert "× 12" in words(twelve)
    assert "layers 0–11" in words(twelve)
    assert two.get("height") == twelve.get("height")


def test_layers_that_differ_in_sizes_alone_are_drawn_once_with_the_range() -> None:
    root = drawing(blocks([32, 40, 56], [None] * 3))
    assert drawn(root)["card"] == 1
    assert "32–56 × 24" in words(root)
    assert "× 3" in words(root)


def test_layers_that_take_turns_are_two_blocks_and_the_page_shows_their_order() -> None:
    found = blocks([32] * 4, [5, None, 5, None])
    root = drawing(found)
    assert drawn(root)["card"] == 2
    assert {"3 heads · window 5", "3 heads · full", "layers 0, 2", "layers 1, 3"} <= set(words(root))
    assert re.findall(r'<span class="(k\d)"', page(found)) == ["k0", "k1", "k0", "k1"]


def test_the_memory_of_cross_attention_is_a_line_from_the_encoder() -> None:
    assert drawn(drawing(outlined("t5")))["memory"] > 0
    assert drawn(drawing(outlined("bert")))["memory"] == 0


@pytest.mark.parametrize("name", [*zoo.NAMES, *SPECIAL])
def test_boxes_lie_in_the_picture_and_apart(name: str) -> None:
    root = drawing(block_outline(SPECIAL[name]) if name in SPECIAL else outlined(name))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    boxes: list[tuple[float, float, float, float]] = []
    for kind, (left, top, right, bottom) in rectangles(root):
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        if kind not in ("card", "pile"):
            boxes.append((left, top, right, bottom))
    assert len(boxes) > 4
    for place, (left, top, right, bottom) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[:place]:
            apart = max(left - x1, x0 - right, top - y1, y0 - bottom)
            assert apart >= -0.2  # coordinates are written with one digit


def test_a_gate_is_drawn_beside_v_and_what_a_router_says_is_dashed() -> None:
    spans = dict(rectangles(drawing(block_outline(SPECIAL["gated"]))))
    assert spans["attention-gate"][1] == spans["attention-v"][1]
    assert spans["attention-gate"][0] > spans["attention-v"][2]
    assert spans["attention-gate"][0] > spans["core"][2]
    assert (
        len([1 for g in drawing(block_outline(SPECIAL["shared expert"])).iter("g") if g.get("class") == "choice"]) == 2
    )


def test_a_norm_that_sublayers_share_is_as_wide_as_they_are() -> None:
    spans = dict(rectangles(drawing(block_outline(SPECIAL["parallel"]))))
    assert spans["norm"][0] == spans["attention-q"][0]
    assert spans["norm"][2] == spans["ffn-up"][2]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_page_fetches_nothing(name: str) -> None:
    text = zoo.traced(name).html("a footer")
    for word in ("http", "fetch(", "import(", "url(", "src=", "@import", "<link", "$"):
        assert word not in text, word
    assert "a footer" in text
    opened = re.findall(r"<(section|table|tbody|tr|td|main|svg|g|ul|li)\b", text)
    assert Counter(opened) == Counter(re.findall(r"</(section|table|tbody|tr|td|main|svg|g|ul|li)>", text))


@pytest.mark.parametrize("name", ["mixtral", "t5"])
def test_boxes_rows_and_lines_of_the_text_are_linked(name: str) -> None:
    text = zoo.traced(name).html()
    boxes, rows, lines = (set(re.findall(rf'<{tag}[^>]* data-site="([^"]+)"', text)) for tag in ("g", "tr", "span"))
    assert boxes <= rows
    assert lines <= rows
    wanted = {key for key in rows if key.startswith(("attention.q ", "attention.o ", "ffn.down "))}
    assert wanted
    assert wanted <= boxes & lines
    assert text.count("<summary>") == (2 if name == "t5" else 1)


def test_the_text_of_a_page_is_of_one_layer_of_each_kind() -> None:
    found = page(blocks([32] * 30, [None] * 30), "", ())
    assert "pre class" not in found
    program = zoo.traced("bert")
    lines = program.text().splitlines()
    shown = re.search(r'<pre class="layer">(.*?)</pre>', program.html(), re.S)
    assert shown is not None
    printed = [html.unescape(line) for line in re.findall(r"<span[^>]*>(.*?)\n</span>", shown[1], re.S)]
    assert printed == [line.strip() for line in lines if line.startswith("  %0.")]


def test_the_table_of_the_page_has_a_row_for_each_part() -> None:
    text = page(outlined("mixtral"))
    body = re.sub(r"<[^>]+>", " ", text[text.index("<tbody>") :])
    rows = re.sub(r"\s+", " ", body)
    assert "layers 0-1 × 2 self-attention (pre-norm), feed-forward (pre-norm, 4 experts)" in rows
    assert "attention.k model.layers.*.self_attn.k_proj 16 × 48 2 × 8 768" in rows
    assert "ffn.down model.layers.*.mlp.experts.down_proj 48 × 80 15,360 4 experts" in rows


def test_a_model_without_blocks_has_a_page_that_says_why() -> None:
    program = convolutions()
    text = program.html()
    assert "<svg" not in text
    assert "no residual stream with attention or a feed-forward on it was found" in text
    assert "no softmax, no scaled_dot_product_attention" in text
    assert "no residual stream" in program._repr_html_()


def test_a_notebook_shows_the_drawing() -> None:
    shown = zoo.traced("nano")._repr_html_()
    assert shown.startswith("<style>")
    assert shown.endswith("</svg>")


def test_names_are_escaped() -> None:
    class Evil(Blocks):
        pass

    Evil.__name__ = "<b>&"
    program = pg.trace(Evil([32], [None]), {"idx": torch.randint(0, 17, (3, 7))})
    assert "<b>&" not in program.html()
    assert "&lt;b&gt;&amp;" in program.html()


def test_the_picture_in_the_documentation_is_what_is_drawn() -> None:
    stored = Path(__file__).parents[2] / "docs" / "blocks.svg"
    assert stored.read_text(encoding="utf-8") == model_figure(outlined("mixtral"), standalone=True) + "\n"


def test_a_column_runs_from_the_top_to_the_bottom() -> None:
    root = drawing(outlined("llama"))
    tops = {g.get("class"): float(g.findall("rect")[0].get("y", "nan")) for g in root.iter("g") if g.findall("rect")}
    order = ["embedding", "card", "attention-q", "core", "attention-o", "ffn-gate", "ffn-down", "head-out"]
    assert all(tops[before] < tops[after] for before, after in pairwise(order))
