"""Exported files run without peftgraph, without transformers, and at sizes that were not traced."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.ir.program import ProgramData
from peftgraph.passes.lora import LoRA
from peftgraph.runtime.export.axis_names import axis_names, renamed
from peftgraph.runtime.export.exported_program import to_exported_program
from peftgraph.runtime.plain_aten import in_plain_aten

SIZES = ((1, 1), (2, 5), (4, 9))
# Runs a .pt2 file on the inputs of a safetensors file, where neither peftgraph nor transformers can be imported.
RUNNER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("peftgraph", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    model = torch.export.load(folder + "/model.pt2").module()
    tensors, results = load_file(folder + "/in.safetensors"), {}
    for size in sorted({key.partition("/")[0] for key in tensors}):
        inputs = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(size + "/")}
        outputs = model(**inputs)
        assert type(outputs) is dict
        results |= {f"{size}/{key}": value.contiguous() for key, value in outputs.items()}
    save_file(results, folder + "/out.safetensors")
"""


def programs(name: str) -> dict[str, pg.Program]:
    tuned = zoo.randomise(zoo.traced(name).apply(LoRA(rank=2)))
    return {"lora": tuned, "merged": pg.fold(tuned)}


def example(name: str, batch: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(batch)
    return zoo.example(name, batch, length)


def expected(program: ProgramData, name: str, batch: int, length: int) -> dict[str, Tensor]:
    outputs = pg.Program.module(program).eval()(**example(name, batch, length))
    return {key: value for key, value in outputs.items() if isinstance(value, Tensor)}


def test_pt2_runs_alone(tmp_path: Path) -> None:
    wanted: dict[str, dict[str, Tensor]] = {}
    for kind, program in programs("nano").items():
        folder = tmp_path / kind
        program.export(folder / "model.pt2")
        inputs = {f"{b}x{s}/{k}": v for b, s in SIZES for k, v in example("nano", b, s).items()}
        save_file(inputs, folder / "in.safetensors")
        wanted[str(folder)] = {f"{b}x{s}/{k}": v for b, s in SIZES for k, v in expected(program, "nano", b, s).items()}
    run = subprocess.run([sys.executable, "-I", "-c", RUNNER, *wanted], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for folder, outputs in wanted.items():
        found = load_file(f"{folder}/out.safetensors")
        assert found.keys() == outputs.keys()
        for key, value in outputs.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=f"{folder} {key}")


def test_no_guard_on_the_traced_sizes_is_left() -> None:
    program = zoo.traced("gpt2")  # its code reshapes the mask, which makes the exporter guard that 3 is not 7
    module = to_exported_program(program).module()
    for batch, length in SIZES:
        outputs = module(**example("gpt2", batch, length))
        assert torch.equal(outputs["logits"], expected(program, "gpt2", batch, length)["logits"])
    with pytest.raises(AssertionError, match="Guard failed: .*attention_mask"):
        module(**{**example("gpt2", 2, 5), "attention_mask": torch.ones(2, 4, dtype=torch.long)})


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_onnx_runs_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    program = programs("nano")[kind]
    session = runtime.InferenceSession(program.export(tmp_path / "model.onnx"))
    assert [value.name for value in session.get_inputs()] == ["idx"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    assert session.get_inputs()[0].shape == ["batch", "sequence"]
    assert session.get_outputs()[0].shape[:2] == ["batch", "sequence"]
    for batch, length in SIZES:
        (logits,) = session.run(None, {"idx": example("nano", batch, length)["idx"].numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits), expected(program, "nano", batch, length)["logits"], rtol=1e-4, atol=1e-5
        )


class Towers(nn.Module):
    """Pictures and rows that need not be equally many, and a mask that is added to the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, pixel_values: Tensor, text_ids: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(pixel_values), self.fc(text_ids) + bias


def test_axes_have_one_name_a_size() -> None:
    inputs = (torch.randn(2, 3, 9, 8), torch.randn(3, 5, 4), torch.randn(3, 5, 1))
    exported = to_exported_program(pg.trace(Towers().eval(), inputs))
    names = axis_names(exported)
    shapes = {
        node.name: [renamed(str(size), names) for size in node.meta["val"].shape]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in exported.graph_signature.user_inputs
    }
    assert shapes == {
        "pixel_values": ["batch", "3", "height", "width"],
        "text_ids": ["text_batch", "sequence", "4"],
        "bias": shapes["bias"],
    }
    assert shapes["bias"][1] == "sequence"
    assert renamed("s7 + 10", {"s7": "sequence"}) == "sequence + 10"


class Experts(nn.Module):
    """Rows sorted by expert go through one grouped product."""

    def __init__(self) -> None:
        super().__init__()
        import transformers.integrations.moe  # noqa: F401  (registers the operator)

        self.w = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.w, offsets)


@pytest.mark.parametrize("ends", [(2, 5, 7), (0, 7, 7), (7, 7, 7)])
def test_grouped_products_are_spelled_out(ends: tuple[int, ...]) -> None:
    model, x = Experts().requires_grad_(False), torch.randn(7, 6)
    offsets = torch.tensor(ends, dtype=torch.int32)
    program = pg.trace(model, (x, torch.tensor([2, 5, 7], dtype=torch.int32)))
    assert "grouped_mm" in program.text()
    assert "grouped_mm" not in str(in_plain_aten(program.graph))
    out = to_exported_program(program).module()(x=x, offsets=offsets)["output"]
    torch.testing.assert_close(out, model(x, offsets), rtol=1e-6, atol=1e-6)


def test_inputs_keep_the_names_of_the_model() -> None:
    class Named(nn.Linear):
        def forward(self, input: Tensor, pair: tuple[Tensor, ...]) -> Tensor:
            return super().forward(input + pair[0])

    x = torch.randn(3, 6)
    program = pg.trace(Named(6, 5), {"input": x, "pair": (x,)})
    module = to_exported_program(program).module()
    assert torch.equal(module(input=x, pair_0=x)["output"], program.module()(x, (x,)))


def test_no_file_is_left_by_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = zoo.traced("nano")
    with pytest.raises(pg.ExportError, match=r"model.pth: the suffix says the format; known are .onnx, .pt2"):
        program.export(tmp_path / "model.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(pg.ExportError, match=r'needs onnx and onnxscript: pip install "peftgraph\[onnx\]"'):
        program.export(tmp_path / "model.onnx")
    monkeypatch.undo()

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr("torch.export.export", refuse)
    with pytest.raises(pg.ExportError, match="torch.export refuses the program: RuntimeError: not today"):
        program.export(tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(pg.PeftGraphError, match=r"model.pt2 cannot be written: No space left on device"):
        zoo.traced("nano").export(tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"old"
