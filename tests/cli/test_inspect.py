"""`peftgraph inspect` on configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import zoo

from peftgraph.cli.examples import example_inputs
from peftgraph.cli.models import skeleton, trace
from peftgraph.cli.tables import groups

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


def test_the_table_collapses_layers_that_look_alike(cli, folder: Path) -> None:
    result = cli("inspect", folder)
    assert result.exit_code == 0, result.stderr
    assert "layers 0-1" in result.stdout
    assert "encoder.layer.*" in result.stdout
    assert "post-norm" in result.stdout
    assert "36 sites" in result.stdout or "sites:" in result.stdout


def test_all_shows_every_layer(cli, folder: Path) -> None:
    result = cli("inspect", folder, "--all")
    assert "layers 0-1" not in result.stdout
    assert "layer 1" in result.stdout
    assert "attention.self.query.bias" in result.stdout


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


def test_sites_outside_of_layers_stay_in_graph_order() -> None:
    titles = [group.title for group in groups(zoo.traced("t5").sites)]
    assert titles[:2] == ["outside of layers", "encoder layers 0-1"]
    assert titles[-1] == "outside of layers"
