"""Pictures as files, titles and legends, a colour for each inner pass, and the names of constants."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo
from typer.testing import CliRunner

import peftgraph as pg
import peftgraph.authoring as pga
from peftgraph.authoring.modules import init
from peftgraph.cli.app import app
from peftgraph.draw.colours import Colours, parts_of
from peftgraph.draw.css_values import values_of
from peftgraph.passes import IA3, AdapterDrop, IntrinsicSAID, LoRA, UniPELT


@dataclass(frozen=True, kw_only=True)
class Vectors(pga.Pass):
    """Trains vectors between two frozen matrices, which are constants or shared.

    Attributes:
        rank: R, at least 1.
    """

    word = "vectors"
    rank: int = 5
    shared: bool = False

    def rules(self) -> list[pga.Rule]:
        return [pga.Rule(at=pg.attention.v, delta=self.delta, fold="it is a test")]

    def delta(self, m: pga.Match, op: pga.Builder) -> object:
        rows, columns = m.weight.shape
        shapes = {"vectors_A": (self.rank, columns), "vectors_B": (rows, self.rank)}
        if self.shared:
            a, b = (op.shared_param(name, shape, init.kaiming, trainable=False) for name, shape in shapes.items())
        else:
            a, b = (op.constant(name, torch.ones(shape)) for name, shape in shapes.items())
        scaled = op.mul(op.linear(m.input, a), op.param("vectors_d", (self.rank,), init.ones))
        return op.mul(op.linear(scaled, b), op.param("vectors_b", (rows,), init.zeros))


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)", svg)


@pytest.mark.parametrize("shared", [True, False])
def test_constants_of_a_pass_have_names_and_are_dashed(shared: bool) -> None:
    svg = zoo.traced("bert").apply(Vectors(shared=shared)).picture().svg
    frozen = re.findall(
        r'<g class="inserted p0 frozen letter">(?:<title>[^<]*</title>)?<\w+[^>]*/><text[^>]*>(\w)', svg
    )
    assert frozen == ["A", "B"]
    assert {"R × D", "D × R"} <= set(texts(svg))
    assert any("dashed: does not train" in text for text in texts(svg))


def test_what_a_random_function_is_made_of_is_told() -> None:
    svg = zoo.traced("bert").apply(IntrinsicSAID(dimension=50)).picture().svg
    assert "W_q + P(v) l" in texts(svg)
    (told,) = (text for text in texts(svg) if text.startswith("P(v) = "))
    assert "said_signs" in told
    assert "said_normal" in told


def test_a_title_and_the_counts() -> None:
    tuned = zoo.traced("bert").apply(LoRA(rank=4), IA3())
    svg = tuned.picture().svg
    count = tuned.count()
    assert texts(svg)[0] == "BertModel with lora and ia3"
    assert texts(svg)[1].startswith(f"{count.trainable:,} values train, ")
    assert texts(svg)[1].endswith(f"{count.total:,}")
    assert "with ia3" in texts(tuned.picture(before=zoo.traced("bert").apply(LoRA(rank=4))).svg)[0]


def test_the_passes_inside_a_pass_have_colours_and_names() -> None:
    svg = zoo.traced("bert").apply(UniPELT()).picture().svg
    gates = re.findall(
        r'<g class="inserted (p\d)[^"]*">(?:<title>[^<]*</title>)?<polygon[^>]*/><text[^>]*>(\w+_gate)', svg
    )
    assert set(gates) == {("p0", "lora_gate"), ("p1", "prefix_gate"), ("p2", "pfeiffer_gate")}
    legend = [text for text in texts(svg) if re.match(r"(unipelt|lora|prefix|pfeiffer)\{", text)]
    assert [text.partition("{")[0] for text in legend] == ["unipelt", "lora", "prefix", "pfeiffer"]
    assert "methods=[3 below]" in legend[0]


def test_a_pass_whose_rules_are_no_sum_has_one_colour() -> None:
    outer, parts = parts_of(AdapterDrop(layers=1, adapter=pg.parse_pass("pfeiffer{}")))
    assert outer == ""
    assert len(parts) == 1
    colours = Colours({3: UniPELT(), 7: LoRA()})
    assert 3 in colours
    assert 4 not in colours
    assert [colours.of(3, 0), colours.of(7, 0)] == ["p0", "p3"]
    assert [css for css, _ in colours.legend()] == ["", "p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_files_for_print_are_equal_for_equal_pictures(suffix: str, tmp_path: Path) -> None:
    picture = zoo.traced("bert").apply(LoRA(rank=4), IA3()).picture()
    first, second = (picture.save(tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
    assert first == second
    assert first.startswith({".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix])
    if suffix == ".png":
        from matplotlib.image import imread

        pixels = imread(tmp_path / "a.png")
        width, height = (float(one) for one in re.findall(r' (?:width|height)="([\d.]+)"', picture.svg)[:2])
        assert pixels.shape[:2] == pytest.approx((2 * height, 2 * width), abs=2)
        red = torch.tensor([0xD1, 0x49, 0x5B]) / 255  # lora's colour
        assert bool(((torch.from_numpy(pixels[..., :3].copy()) - red).abs().amax(-1) < 0.02).any())


def test_the_style_sheet_says_what_is_painted() -> None:
    root = ("svg", frozenset(("figure",)))
    box = values_of((root, ("g", frozenset(("inserted", "p1", "frozen"))), ("rect", frozenset())))
    assert box["stroke"] == "#1f7fbf"
    assert box["stroke-dasharray"] == "4 3"
    assert box["fill"] == "#e2eef7", "13 % of the colour on white"
    assert values_of((root, ("g", frozenset(("base",))), ("rect", frozenset())))["stroke"] == "#98a2b3"
    label = values_of((root, ("g", frozenset(("base",))), ("text", frozenset(("label",)))))
    assert label["font-weight"] == "500", "the more special rule wins"


def test_a_wrong_suffix_and_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = zoo.traced("bert").apply(IA3()).picture()
    with pytest.raises(pg.PeftGraphError, match=r"saved as \.svg, \.pdf, \.png, got 'a\.gif'"):
        picture.save(tmp_path / "a.gif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pg.PeftGraphError, match=r'pip install "peftgraph\[pictures\]"'):
        picture.save(tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    zoo.build("bert").config.save_pretrained(tmp_path)  # pyright: ignore[reportAttributeAccessIssue]
    run = CliRunner()
    told = run.invoke(app, ["draw", str(tmp_path), "--out", str(tmp_path / "model.svg")])
    assert told.exit_code == 0, told.output
    assert "layers 0–1" in (tmp_path / "model.svg").read_text()
    told = run.invoke(
        app, ["draw", str(tmp_path), "-r", "lora{rank=4}", "--layer", "-1", "--out", str(tmp_path / "l.svg")]
    )
    assert told.exit_code == 0, told.output
    assert "layer 1 of 0–1" in (tmp_path / "l.svg").read_text()
    assert run.invoke(app, ["draw", str(tmp_path), "--layer", "1", "--out", "x.svg"]).exit_code == 2
    assert "saved as .svg" in run.invoke(app, ["draw", str(tmp_path), "--out", str(tmp_path / "m.jpg")]).stderr
