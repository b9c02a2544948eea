"""Files of many adapters, of adapters that are given as inputs, and compiled modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

import peftgraph as pg
from peftgraph.passes import IA3, LoRA
from peftgraph.runtime.export.adapter_file import write_adapter_file
from peftgraph.serving import product_by_row
from peftgraph.serving.product_by_row import WAYS, linear_by_row
from peftgraph.serving.product_costs import TYPICAL, ProductCosts, Way, costs_on, measure_costs, use_costs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def program() -> pg.Program:
    torch.manual_seed(0)
    return pg.trace(Net().eval(), {"ids": torch.randint(0, 20, (4, 7))})


def trained(program: pg.Program, *passes: Any) -> pg.Program:
    tuned = program.apply(*passes)
    for value in tuned.table.trainable.values():
        nn.init.normal_(value.data, std=0.3)
        value.requires_grad_(False)
    return tuned


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options)


def inputs(batch: int, length: int, adapters: int) -> dict[str, Tensor]:
    rows = {"adapter_ids": torch.arange(batch) % (adapters + 1)} if adapters else {}
    return {"ids": torch.randint(0, 20, (batch, length)), **rows}


def numpy(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: one.numpy() for name, one in tensors.items()}


def wanted(net: Any, given: dict[str, Tensor]) -> Tensor:
    found = net(**given)
    return found if isinstance(found, Tensor) else found[0]


def test_mixed_batches_in_files(program: pg.Program, tmp_path: Path) -> None:
    low = [trained(program, LoRA(at="linear", rank=rank)) for rank in (2, 5)]
    served = program.serve({"a": low[0], "b": low[1], "c": trained(program, IA3(at="linear"))})
    net = served.module().eval()
    run = session(served.export(tmp_path / "m.onnx"))
    loaded = torch.export.load(served.export(tmp_path / "m.pt2")).module()
    (_, first), (ids, rows) = [(one.name, one.shape) for one in run.get_inputs()]
    assert ids == "adapter_ids"
    assert (first, rows) == (["batch", "sequence"], ["batch"])
    for size in ((4, 7), (1, 2), (6, 3)):
        given = inputs(*size, 3)
        expected = wanted(net, given)
        torch.testing.assert_close(torch.from_numpy(run.run(None, numpy(given))[0]), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(next(iter(loaded(**given).values())), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted(net, given), wanted(net, {**given, "adapter_ids": given["adapter_ids"] * 0}))


@pytest.mark.parametrize("many", [False, True])
def test_adapters_as_inputs(program: pg.Program, tmp_path: Path, many: bool) -> None:
    """Another adapter of other ranks, or more adapters, are given to a file."""
    low = [trained(program, LoRA(at="linear", rank=rank, alpha=alpha)) for rank, alpha in ((4, 4), (7, 3), (2, 9))]
    one, other = (
        (program.serve({"a": low[0], "b": low[2]}), program.serve({"x": low[1], "y": low[2], "z": low[0]}))
        if many
        else low[:2]
    )
    run = session(one.export(tmp_path / "m.onnx", adapters="inputs"))
    loaded = torch.export.load(one.export(tmp_path / "m.pt2", adapters="inputs")).module()
    for value in run.get_overridable_initializers():
        assert not {"batch", "sequence"} & set(value.shape)
    for program_, count in ((one, 2), (other, 3)):
        tensors = load_file(program_.export_adapter(tmp_path / "a.safetensors"))
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(program_.export_adapter(tmp_path / f"{count}.onnx_adapter")))
        options.add_active_adapter(adapter)
        for size in ((4, 7), (5, 3)):
            given = inputs(*size, count if many else 0)
            expected = wanted(program_.module().eval(), given)
            found = [run.run(None, numpy(given), options)[0], run.run(None, numpy({**given, **tensors}))[0]]
            found += [run.run(None, numpy(given))[0]] if program_ is one else []
            for each in found:
                torch.testing.assert_close(torch.from_numpy(each), expected, rtol=1e-5, atol=1e-5)
            mine = next(iter(loaded(**given, adapter_tensors=tensors).values()))
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_refusals(program: pg.Program, tmp_path: Path) -> None:
    with pytest.raises(pg.PeftGraphError, match="has no adapter"):
        program.export(tmp_path / "m.pt2", adapters="inputs")
    with pytest.raises(pg.PeftGraphError, match=r"\.onnx_adapter or \.safetensors"):
        program.apply(LoRA(rank=2, at="linear")).export_adapter(tmp_path / "a.bin")
    with pytest.raises(pg.PeftGraphError, match="inside"):
        program.export(tmp_path / "m.pt2", adapters="outside")  # pyright: ignore[reportArgumentType]


def test_a_compiled_module_keeps_its_graph(program: pg.Program) -> None:
    """Other mixes and swapped adapters run the graph that was compiled first."""
    low = [trained(program, LoRA(at="linear", rank=rank)) for rank in (5, 3, 2)]
    net: Any = program.serve({"a": low[0], "b": low[1]}).module().eval()
    torch._dynamo.reset()
    counters.clear()
    compiled: Any = torch.compile(net, backend="eager", fullgraph=True)
    given = inputs(4, 7, 0)
    for rows in ([0, 1, 2, 0], [2, 2, 1, 1], [0, 0, 0, 0]):
        mixed = {**given, "adapter_ids": torch.tensor(rows)}
        torch.testing.assert_close(wanted(compiled, mixed), wanted(net, mixed))
    ids = torch.tensor([1, 2, 1, 0])
    net.swap("a", low[2])
    found = wanted(compiled, {**given, "adapter_ids": ids})
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found[0], wanted(low[2].module().eval(), given)[0])
    torch.testing.assert_close(found[1], wanted(low[1].module().eval(), given)[1])
    torch.testing.assert_close(found[3], wanted(program.module().eval(), given)[3])
    named: Any = torch.compile(net, backend="eager")
    for rows in (["a", "b", None, None], ["b", "b", "a", None], [None, "a", "a", "b"]):
        mixed = {**given, "adapter_ids": rows}
        torch.testing.assert_close(wanted(named, mixed), wanted(net, mixed))


@pytest.mark.parametrize("transposed", [False, True])
def test_each_way_is_the_plain_product(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry of the batch is multiplied by its own matrix, wherever the batch is, also with an x that all share."""
    torch.manual_seed(0)
    weights = torch.randn(4, 5, 3, dtype=torch.float64)
    rows = torch.tensor([2, 0, 2, 3, 1, 2])
    given = weights.transpose(1, 2).contiguous() if transposed else weights
    x = torch.randn(6, 2, 7, 3, dtype=torch.float64)
    cases = [(x, 0, x), (x.movedim(0, 1), 1, x), (x[:1], 0, x[:1].expand(6, -1, -1, -1))]
    beside = x.flatten(0, 1)  # two entries for each of the batch
    for way in WAYS:
        monkeypatch.setattr(product_by_row, "_way", lambda *_, way=way: way)
        for value, axis, plain in cases:
            found = linear_by_row(value, given, rows, axis, transposed)
            wanted = torch.stack([one @ weights[row].T for one, row in zip(plain, rows.tolist(), strict=True)])
            torch.testing.assert_close(found.movedim(axis, 0), wanted)
        found = linear_by_row(beside, given, rows, 0, transposed)
        wanted = torch.stack([one @ weights[row].T for one, row in zip(x, rows.tolist(), strict=True)])
        torch.testing.assert_close(found, wanted.flatten(0, 1))


def test_measured_costs_choose_the_way() -> None:
    shapes = {"batch": 64, "length": 1, "matrices": 65, "out": 16, "inner": 512}
    measured = measure_costs("cpu")
    assert min(measured.dense, measured.batched, measured.copied, measured.call) > 0
    free = ProductCosts(1.0, 1.0, 1.0, 1.0)
    expected: dict[Way, ProductCosts] = {
        "masked": replace(free, dense=1e-3, copied=1e-3, call=100.0, batched=1e6),
        "gathered": replace(free, dense=1e6),
        "segments": replace(free, batched=1e6, copied=1.0, call=1e-6, dense=1.0),
    }
    try:
        for way, costs in expected.items():
            use_costs("cpu", costs)
            assert costs_on(torch.device("cpu")).cheapest(**shapes) == way
    finally:
        use_costs("cpu", None)
    assert costs_on(torch.device("cpu")) == TYPICAL["cpu"]


def test_an_adapter_file_in_half_precision(tmp_path: Path) -> None:
    values = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(2)}
    read = ort.AdapterFormat.read_adapter(str(write_adapter_file(values, tmp_path / "x.onnx_adapter")))
    kinds = {name: (one.data_type(), one.shape()) for name, one in read.get_parameters().items()}
    assert kinds == {"a": ("tensor(bfloat16)", [3, 4]), "b": ("tensor(float)", [2])}
