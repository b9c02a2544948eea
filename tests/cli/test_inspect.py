"""`peftgraph inspect` on configurations alone."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from rich.console import Console

from peftgraph.draw import outline
from peftgraph.model_folders.example_inputs import example_inputs
from peftgraph.model_folders.loading import skeleton, trace
from peftgraph.terminal.tables import OutlineTable

PLAIN = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
VISION |= {"image_size": 24, "patch_size": 8}
WHISPER = {"vocab_size": 99, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 16}
WHISPER |= {"encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80}
WHISPER |= {"max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER, 6),
    "CLIPModel": ("CLIPConfig", {"text_config": PLAIN, "vision_config": VISION, "projection_dim": 32}, 4),
    "RobertaForSequenceClassification": ("RobertaConfig", PLAIN, 2),
    "Gemma2ForCausalLM": ("Gemma2Config", {**GROUPED, "sliding_window": 16}, 2),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED, 2),
}


def write_config(config: object, architecture: str | None, path: Path) -> Path:
    config.architectures = None if architecture is None else [architecture]  # pyright: ignore[reportAttributeAccessIssue]
    config.save_pretrained(path)  # pyright: ignore[reportAttributeAccessIssue]
    return path


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "nano"])
def test_every_architecture_of_the_zoo_is_inspected_from_its_config(name: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    write_config(model.config, type(model).__name__, tmp_path)
    program = trace(skeleton(tmp_path))
    assert program.model == type(model).__name__
    found = {site.id for site in program.sites}
    assert found == {site.id for site in zoo.traced(name).sites}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_families_are_inspected_from_their_config(architecture: str, tmp_path: Path) -> None:
    config, sizes, queries = OTHERS[architecture]
    write_config(getattr(transformers, config)(**sizes), architecture, tmp_path)
    program = trace(skeleton(tmp_path))
    assert len(program.sites.select("attention.q")) == queries
    assert all(tensor.device.type == "meta" for tensor in program.table.tensors().values())


def test_example_inputs_do_not_move_the_users_generator() -> None:
    model = zoo.build("bert")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    example_inputs(model)  # pyright: ignore[reportArgumentType]
    assert torch.equal(before, torch.get_rng_state())


BERT = """
role           weight                    out x in  heads  notes
before the layers
  embedding    embeddings.word_embeddings  48 x 61
  norm         embeddings.LayerNorm             48         bias

layers 0-1  x 2  encoder.layer.*
  self-attention (post-norm), feed-forward (post-norm), 17,408 parameters each
  attention.q  attention.self.query        48 x 48  6 x 8  bias
  attention.k  attention.self.key          48 x 48  6 x 8  bias
  attention.v  attention.self.value        48 x 48  6 x 8  bias
  attention.o  attention.output.dense      48 x 48         bias
  norm         attention.output.LayerNorm       48         post-norm, bias
  ffn.up       intermediate.dense          80 x 48         bias
  ffn.down     output.dense                48 x 80         bias
  norm         output.LayerNorm                 48         post-norm, bias

after the layers
  head         pooler.dense                48 x 48         bias
"""
MIXTRAL = """
layers 0-1  x 2  model.layers.*
  self-attention (pre-norm), feed-forward (pre-norm, 4 experts), 52,512 parameters each
  norm         input_layernorm                 48         pre-norm
  attention.q  self_attn.q_proj           48 x 48  6 x 8
  attention.k  self_attn.k_proj           16 x 48  2 x 8
  attention.v  self_attn.v_proj           16 x 48  2 x 8
  attention.o  self_attn.o_proj           48 x 48
  norm         post_attention_layernorm        48         pre-norm
  router       mlp.gate                    4 x 48
  ffn.gate     mlp.experts.gate_up_proj   80 x 48         4 experts, columns 0:80, fused with up
  ffn.up       mlp.experts.gate_up_proj   80 x 48         4 experts, columns 80:160, fused with gate
  ffn.down     mlp.experts.down_proj      48 x 80         4 experts
"""


def table(name: str, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    program = zoo.traced(name)
    console.print(OutlineTable(outline(program, program.sites)))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def cells(lines: Sequence[str]) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in lines if line.strip()]


@pytest.mark.parametrize(("name", "golden"), [("bert", BERT), ("mixtral", MIXTRAL)])
def test_the_table_in_full(name: str, golden: str) -> None:
    expected, rows = cells(golden.splitlines()), cells(table(name, 130))
    start = rows.index(expected[0])
    assert rows[start : start + len(expected)] == expected


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_table_fits_a_narrow_terminal_and_its_columns_are_straight(name: str) -> None:
    lines = table(name, 80)
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith(("  attention.", "  ffn."))]
    assert len({line.index(" x ") for line in rows if " x " in line}) == 1


def test_layers_that_look_alike_are_told_once(cli, folder: Path) -> None:
    result = cli("inspect", folder)
    assert result.exit_code == 0, result.stderr
    assert "layers 0-1  x 2  encoder.layer.*" in result.stdout
    assert "43,360 parameters · 2 layers · self-attention, 6 heads · post-norm" in result.stdout
    assert result.stdout.count("attention.self.query") == 1
    assert "2 attention.q," in " ".join(result.stdout.split())


def test_all_shows_every_site(cli, folder: Path) -> None:
    result = cli("inspect", folder, "--all")
    assert "1.attention.q " in result.stdout
    assert "encoder.layer.1.attention.self.query.bias" in result.stdout


def test_a_selection_is_listed_with_its_layers(cli, folder: Path) -> None:
    rows = cells(cli("inspect", folder, "--at", "attention.q | block").stdout.splitlines())
    assert rows[1:3] == [
        ["attention.q", "0-1", "encoder.layer.*.attention.self.query", "48 x 48"],
        ["block", "0-1", "encoder.layer.*"],
    ]


def test_html_writes_a_page(cli, folder: Path, tmp_path: Path) -> None:
    result = cli("inspect", folder, "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    assert f"page written to {tmp_path / 'page.html'}" in result.stdout.replace("\n", "")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "BertModel" in text
    assert "<svg" in text
    assert "Drawn by peftgraph" in text


def test_html_and_json_go_together(cli, folder: Path, tmp_path: Path) -> None:
    result = cli("inspect", folder, "--json", "--html", tmp_path / "page.html")
    assert json.loads(result.stdout)["model"] == "BertModel"
    assert (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_the_users_error(cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("inspect", folder, "--html", tmp_path / "file" / "page.html")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_json_is_json_and_nothing_else(cli, folder: Path) -> None:
    result = cli("inspect", folder / "config.json", "--json")
    document = json.loads(result.stdout)
    assert document["model"] == "BertModel"
    assert document["layers"] == 2
    assert document["counts"]["attention.q"] == 2
    assert [site["id"] for site in document["sites"] if site["role"] == "attention.q"] == [
        "0.attention.q",
        "1.attention.q",
    ]
    assert all(isinstance(site["shape"], list) for site in document["sites"] if site["weight"])
    assert {site["heads"] for site in document["sites"] if site["role"] == "attention.k"} == {6}
    assert {site["layout"] for site in document["sites"] if site["role"] == "ffn"} == {"post"}
    assert document["inputs"][0]["name"] == "input_ids"


def test_at_narrows_and_explains_when_nothing_is_left(cli, folder: Path) -> None:
    result = cli("inspect", folder, "--json", "--at", "attention.q & layers(1, 2)")
    assert [site["id"] for site in json.loads(result.stdout)["sites"]] == ["1.attention.q"]
    result = cli("inspect", folder, "--at", "ffn.gate")
    assert result.exit_code == 1
    assert "ffn.gate" in result.stderr


def test_explain_shows_the_steps_and_the_lines_of_the_graph(cli, folder: Path) -> None:
    result = cli("inspect", folder, "--explain", "attention.q", "--layer", -1)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("1.attention.q at encoder.layer.1.attention.self.query (")
    assert "  2. q is " in result.stdout
    assert "    %1.attention.q: f32[B, S, " in result.stdout
    result = cli("inspect", folder, "--explain", "ffn.gate")
    assert "expected a multiplication of two values of different columns behind it, found gelu" in result.stdout
    result = cli("inspect", folder, "--layer", 1)
    assert result.exit_code == 2
    assert "--layer narrows --explain" in result.stderr
