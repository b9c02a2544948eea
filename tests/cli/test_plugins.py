"""Adapter formats and exporters of others: registered in one place, they work in Python and on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import ExportedProgram

import peftgraph as pg
from peftgraph.model_folders.loading import load, trace
from peftgraph.passes import LoRA
from peftgraph.plugins import (
    ADAPTER_FORMATS,
    EXPORTERS,
    AdapterFormat,
    Exporter,
    ParameterKey,
    PassWithValues,
    ProgramData,
)
from peftgraph.utils import registry

INDEX, TENSORS = "ranks.json", "ranks.safetensors"


def read(program: ProgramData, sites: pg.Sites, directory: Path) -> list[PassWithValues]:
    rank = json.loads((directory / INDEX).read_text())["rank"]
    values: dict[ParameterKey, Tensor] = {}
    for name, value in load_file(directory / TENSORS).items():
        site, _, leaf = name.rpartition("/")
        values[site, leaf] = value
    return [PassWithValues(LoRA(rank=rank), values)]


def write(program: ProgramData, sites: pg.Sites, directory: Path) -> None:
    directory.mkdir()
    (method,) = (applied.method for applied in program.history)
    assert isinstance(method, LoRA)
    (directory / INDEX).write_text(json.dumps({"rank": method.rank}))
    named = {f"{edit.site}/{name.rpartition('.')[2]}": name for edit in program.edits for name in edit.parameters}
    save_file({short: program.table[name].tensor.detach() for short, name in named.items()}, directory / TENSORS)


def lists_operators(exported: ExportedProgram, path: Path) -> None:
    path.write_text("\n".join(str(node.target) for node in exported.graph.nodes if node.op == "call_function"))


RANKS = AdapterFormat(
    name="ranks",
    description="a test's own",
    detect=lambda directory: (directory / INDEX).exists(),
    read=read,
    write=write,
)
OPERATORS = Exporter(name="ops", description="a list of operators", write=lists_operators)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ADAPTER_FORMATS.register(RANKS)
    EXPORTERS.register(OPERATORS)
    yield
    ADAPTER_FORMATS.unregister("ranks")
    EXPORTERS.unregister("ops")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> pg.Program:
    torch.manual_seed(0)
    return zoo.randomise(trace(load(folder)).apply(LoRA(rank=2)))


def outputs(net: torch.nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        return zoo.leaves(net.eval()(**zoo.example("bert")))


def test_a_format_of_others_is_written_read_and_merged(cli, folder: Path, tuned: pg.Program, tmp_path: Path) -> None:
    directory = tuned.save_adapter(tmp_path / "adapter", format="ranks")
    assert sorted(path.name for path in directory.iterdir()) == [INDEX, TENSORS]
    assert tuned.base is not None
    base = tuned.remove()
    for loaded in (base.load_adapter(directory), base.load_adapter(directory, name="dog", format="ranks")):
        for ours, theirs in zip(outputs(loaded.module()), outputs(tuned.module()), strict=True):
            assert torch.equal(ours, theirs)
    result = cli("merge", folder, directory, "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    for merged, theirs in zip(outputs(load(tmp_path / "merged")), outputs(tuned.module()), strict=True):
        torch.testing.assert_close(merged, theirs, rtol=1e-4, atol=1e-5)
    result = cli("merge", folder, directory, "--out", tmp_path / "again", "--by-shard")
    assert result.exit_code == 1
    assert "in the format 'ranks', which is not merged by shard. Merge it in memory: --whole." in result.stderr


def test_an_exporter_of_others_is_found_by_its_suffix(cli, folder: Path, tuned: pg.Program, tmp_path: Path) -> None:
    assert "aten.linear.default" in tuned.export(tmp_path / "model.ops").read_text()
    result = cli("export", folder, "--out", tmp_path / "again.ops")
    assert result.exit_code == 0, result.stderr
    assert "aten.linear.default" in (tmp_path / "again.ops").read_text()
    result = cli("export", folder, "--out", tmp_path / "model.txt")
    assert result.exit_code == 1
    assert "known are .onnx, .ops, .pt2. Another is registered as an entry point" in result.stderr
    assert "'peftgraph.exporters', or at run time (peftgraph.plugins)" in result.stderr


def test_an_exporter_says_what_it_needs(tuned: pg.Program, tmp_path: Path) -> None:
    needy = Exporter(
        name="needy", description="", write=lists_operators, requires=("no_such_module",), install="pip install it"
    )
    EXPORTERS.register(needy)
    try:
        with pytest.raises(pg.ExportError, match=r"\.needy export needs no_such_module: pip install it"):
            tuned.export(tmp_path / "model.needy")
    finally:
        EXPORTERS.unregister("needy")


def test_a_directory_of_two_formats_is_refused_unless_one_is_named(tuned: pg.Program, tmp_path: Path) -> None:
    directory = tuned.save_adapter(tmp_path / "adapter", format="ranks")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    base = tuned.remove()
    with pytest.raises(pg.AdapterError, match="recognised by several adapter formats: peft, ranks. Say which one"):
        base.load_adapter(directory)
    assert str(base.load_adapter(directory, format="ranks").recipe).startswith("lora{")
    with pytest.raises(pg.AdapterError, match="format must be one of peftgraph, adapterhub, peft, ranks, got 'rank'"):
        base.load_adapter(directory, format="rank")


def test_a_format_that_does_one_thing_only(tuned: pg.Program, tmp_path: Path) -> None:
    ADAPTER_FORMATS.register(AdapterFormat(name="none", description="", detect=lambda directory: False))
    try:
        with pytest.raises(pg.AdapterError, match="in the format 'none' are read only"):
            tuned.save_adapter(tmp_path / "adapter", format="none")
        with pytest.raises(pg.AdapterError, match="in the format 'none' are written only"):
            tuned.remove().load_adapter(tmp_path, format="none")
    finally:
        ADAPTER_FORMATS.unregister("none")


def test_what_is_no_plug_in_or_has_a_name_twice_is_refused() -> None:
    with pytest.raises(pg.AdapterError, match="There is an adapter format 'peft' already; choose another name"):
        ADAPTER_FORMATS.register(AdapterFormat(name="peft", description="", detect=lambda directory: True))
    with pytest.raises(pg.ExportError, match="The exporter must be of the class Exporter, got AdapterFormat"):
        EXPORTERS.register(RANKS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.ExportError, match="No exporter 'onnx' was registered in this process"):
        EXPORTERS.unregister("onnx")
    with pytest.raises(
        pg.ExportError, match=r"There is no exporter 'onx'. Did you mean 'onnx'\? Known: onnx, ops, pt2"
    ):
        EXPORTERS.get("onx")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("peftgraph.no_such_module:EXPORTER", "cannot be loaded: No module named 'peftgraph.no_such_module'"),
        ("peftgraph.errors:PACKAGE", "peftgraph.errors:PACKAGE is no Exporter called 'broken'"),
    ],
)
def test_a_broken_entry_point_is_named(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("broken", value, "peftgraph.exporters")])
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(pg.ExportError, match=words):
        EXPORTERS.get("broken")
