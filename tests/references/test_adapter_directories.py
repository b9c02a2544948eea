"""Directories that the `adapters` library saved are read: this program answers as the library did.

`record_adapter_directories.py` wrote them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from recorded_models import TOLERANCE, answer, distance, recorded, traced
from safetensors.torch import load_file, save_file

import peftgraph as pg

DIRECTORIES = Path(__file__).parent / "adapter_directories"
CASES = {
    "bert.houlsby": 'houlsby{at=attention|ffn width=4 activation="silu" dropout=0.0',
    "bert.pfeiffer": 'pfeiffer{at=ffn.where(path="encoder\\.layer\\.1") width=4 activation="relu"',
    "bert.parallel": 'parallel_adapter{at=ffn width=4 scale=4.0 learned=false input="residual"',
    "bert.parallel_learned": "learned=true",
    "bert.lora": "lora{at=attention.q|attention.v|ffn.up rank=2 alpha=6.0",
    "bert.ia3": "ia3{at=attention.k|attention.v|ffn.up}",
    "gpt2.houlsby": "houlsby{at=attention|ffn",
    "gpt2.pfeiffer": "pfeiffer{",
    "gpt2.parallel": "parallel_adapter{",
    "gpt2.lora": "lora{at=attention.q|attention.v|ffn.up",
    "gpt2.ia3": "ia3{at=attention.k|attention.v|ffn.up}",
    "llama.houlsby": "houlsby{at=attention|ffn",
    "llama.pfeiffer": "pfeiffer{",
    "llama.parallel": "parallel_adapter{",
    "llama.lora": "lora{at=attention.q|attention.v|ffn.down",
    "llama.ia3": "ia3{at=attention.k|attention.v|ffn.down}",
}


def load(case: str, directory: Path | None = None) -> pg.Program:
    """The program of a case; (IA)3 stands elsewhere than in the paper in every family."""
    program, directory = traced(case.partition(".")[0]), directory or DIRECTORIES / case
    if not case.endswith("ia3"):
        return program.load_adapter(directory)
    with pytest.warns(UserWarning, match=r"scales the output of ffn.(up|down), no ffn.hidden") as caught:
        loaded = program.load_adapter(directory)
    assert caught[0].filename == __file__
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_librarys(case: str) -> None:
    name, loaded = case.partition(".")[0], load(case)
    theirs = load_file(DIRECTORIES / case / "expected.safetensors")["output"]
    assert distance(answer(loaded, name), theirs) < TOLERANCE[name]
    assert distance(theirs, recorded(name)["output"]) > 1e-2
    assert CASES[case] in str(loaded.recipe)


def test_every_directory_is_read_or_refused() -> None:
    assert {path.name for path in DIRECTORIES.iterdir()} == {*CASES, "bert.compacter", "bert.prompt"}


@pytest.mark.parametrize(("case", "words"), [
    ("bert.compacter", "adapter_down.0.W_left, which belongs to no method that is read"),
    ("bert.prompt", "prompt_embedding.weight, which belongs to no method that is read"),
])  # fmt: skip
def test_methods_that_are_not_read(case: str, words: str) -> None:
    with pytest.raises(pg.AdapterError, match=words):
        load(case)


OPTIONS: dict[str, tuple[str, dict[str, object], str]] = {
    "norm": ("bert.houlsby", {"ln_before": True}, "has ln_before=True, which is not read"),
    "activation": ("bert.houlsby", {"non_linearity": "leakyrelu"}, "has non_linearity='leakyrelu'"),
    "scale": ("bert.pfeiffer", {"scaling": 2.0}, "has scaling=2.0"),
    "dora": ("bert.lora", {"use_dora": True}, "has use_dora=True"),
    "architecture": ("bert.lora", {"architecture": "vera"}, "has architecture='vera'"),
    "rank": ("bert.lora", {"r": 3}, r"lora_A has shape \(2, 16\), the recipe makes \(3, 16\)"),
    "none-of-three": ("gpt2.lora", {"attn_matrices": ["o"]}, "adapts parts of h.0.attn.c_attn"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_make_another_method(option: str, tmp_path: Path) -> None:
    case, changes, words = OPTIONS[option]
    directory = Path(shutil.copytree(DIRECTORIES / case, tmp_path / "adapter"))
    path = directory / "adapter_config.json"
    document = json.loads(path.read_text())
    document["config"] |= changes
    path.write_text(json.dumps(document))
    with pytest.raises(pg.AdapterError, match=words):
        load(case, directory)


def test_pickles_and_empty_files(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DIRECTORIES / "bert.lora", tmp_path / "adapter"))
    save_file({}, directory / "adapter.safetensors")
    with pytest.raises(pg.AdapterError, match="holds no tensors"):
        load("bert.lora", directory)
    (directory / "adapter.safetensors").rename(directory / "pytorch_adapter.bin")
    with pytest.raises(pg.AdapterError, match="is a pickle, which is not read. .* with use_safetensors=True"):
        load("bert.lora", directory)


def test_a_layer_that_the_model_does_not_have(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(DIRECTORIES / "bert.pfeiffer", tmp_path / "adapter"))
    tensors = load_file(directory / "adapter.safetensors")
    save_file({key.replace(".1.", ".7."): v for key, v in tensors.items()}, directory / "adapter.safetensors")
    with pytest.raises(pg.AdapterError, match=r"encoder.layer.7.output: this model has 0 sites ffn in layer 7"):
        load("bert.pfeiffer", directory)
