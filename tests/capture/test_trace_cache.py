"""Programs of earlier traces: what is found again is the program, and whatever a trace depends on makes another key."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.capture import model_identity, trace_model
from peftgraph.capture.example_inputs import bind_example
from peftgraph.capture.model_identity import NotIdentifiable, identity
from peftgraph.capture.trace_cache import find_trace
from peftgraph.passes import LoRA
from peftgraph.utils.cache_folder import cached_files, clear, make_room

FACTOR = 2.0


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


def doubled(x: Tensor) -> Tensor:
    return x + x


class Settings:
    def __init__(self) -> None:
        self.rate, self.names = 0.1, ["a", {"b": (1, 2)}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.dropout = nn.Dropout(self.settings.rate)
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
        self.table = torch.tensor([0, 2, 1])

    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = False) -> dict[str, Tensor]:
        h = self.second(self.dropout(torch.relu(self.first(scaled(x))))) + self.shift
        h = torch.cat([h, h], -1)[..., :6] if twice else h
        h = h if mask is None else h.masked_fill(~mask[..., None], float("-inf")).nan_to_num(neginf=-3.0)
        return {"h": h, "picked": h[..., self.table]}


def example() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"x": torch.randn(3, 5, 6), "mask": torch.tensor([[True] * 4 + [False]] * 3)}


def traced(model: nn.Module, folder: Path, call: dict[str, Any] | None = None, **options: Any) -> pg.Program:
    return pg.trace(model, example() if call is None else call, cache=folder, **options)


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it makes every export fail from then on."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was exported")

    return lambda: monkeypatch.setattr(trace_model, "export_fake_copy", refuse)


def test_a_second_trace_finds_the_program(tmp_path: Path, no_export: Callable[[], None]) -> None:
    model = Net().eval()
    first = traced(model, tmp_path)
    no_export()
    again = traced(model, tmp_path)
    assert again.text() == first.text()
    assert again.signature == first.signature
    assert str(again.sites) == str(first.sites)
    assert again.comparison == first.comparison
    keep = ("stack_trace", "nn_module_stack", "follows", "order", "label")
    for ours, theirs in zip(again.graph.nodes, first.graph.nodes, strict=True):
        assert {key: ours.meta.get(key) for key in keep} == {key: theirs.meta.get(key) for key in keep}
    tuned = again.apply(LoRA(at="linear", rank=2))
    tuned.diff(again)
    other = {"x": torch.randn(2, 9, 6), "mask": torch.rand(2, 9) > 0.5}
    assert torch.equal(pg.fold(tuned).module().eval()(**other)["picked"], model(**other)["picked"])


def test_weights_may_differ_and_are_the_models_own(tmp_path: Path, no_export: Callable[[], None]) -> None:
    traced(Net().eval(), tmp_path)
    no_export()
    other = Net().eval()
    assert torch.equal(traced(other, tmp_path).module().eval()(**example())["h"], other(**example())["h"])


def test_conditions_and_both_modes_are_kept(tmp_path: Path, no_export: Callable[[], None]) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            h = h + torch.rand_like(h) if self.training else h * 2
            return h[:, :4] if x.shape[1] > 4 else h

    model = Branching().eval()
    x = torch.randn(3, 7, 4)
    first = traced(model, tmp_path, {"x": x})
    no_export()
    again = traced(model, tmp_path, {"x": x})
    assert again.signature.conditions == first.signature.conditions != ()
    assert again.text() == first.text()
    with pytest.raises(pg.CallError, match="at least 5"):
        again.module()(torch.randn(3, 3, 4))


def test_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    model = Net()
    wanted = traced(model, tmp_path).text()
    ((path, _),) = cached_files(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], whole.replace(b"dropout", b"dropoot", 1), b"0" * 64 + whole[64:]):
        path.write_bytes(damaged)
        assert find_trace(tmp_path, path.stem) is None
    assert traced(model, tmp_path).text() == wanted
    assert find_trace(tmp_path, path.stem) is not None


def test_a_source_that_has_changed_since_makes_a_file_useless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "helper_of_a_model.py"
    source.write_text("RATE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("helper_of_a_model")
    traced(Net(), tmp_path)
    ((path, _),) = cached_files(tmp_path)
    assert find_trace(tmp_path, path.stem) is not None
    source.write_text("RATE = 2\n")
    assert find_trace(tmp_path, path.stem) is None


def key(change: Callable[[Net, dict[str, Any]], object] | None = None, **options: Any) -> str:
    torch.manual_seed(0)
    model, call = Net(), example()
    if change is not None:
        change(model, call)
    return identity(model, bind_example(model, call), options)


CHANGES: dict[str, Callable[[Net, dict[str, Any]], object]] = {
    "mode": lambda model, call: model.eval(),
    "attribute": lambda model, call: setattr(model, "extra", 1),
    "layer's attribute": lambda model, call: setattr(model.dropout, "p", 0.2),
    "object's attribute": lambda model, call: setattr(model.settings, "rate", 0.2),
    "nested attribute": lambda model, call: model.settings.names.append("c"),
    "int for bool": lambda model, call: setattr(model.dropout, "inplace", 0),
    "dtype": lambda model, call: model.double(),
    "one dtype": lambda model, call: model.second.half(),
    "shape": lambda model, call: setattr(model, "first", nn.Linear(6, 8, bias=False)),
    "class": lambda model, call: setattr(model, "dropout", nn.AlphaDropout(0.1)),
    "frozen": lambda model, call: model.first.weight.requires_grad_(False),
    "stride": lambda model, call: setattr(model.first.weight, "data", torch.randn(6, 8).t()),
    "tie": lambda model, call: model.register_parameter("again", model.first.bias),
    "no tie": lambda model, call: model.register_parameter("again", nn.Parameter(model.first.bias.detach().clone())),
    "buffer's value": lambda model, call: model.shift.add_(1),
    "buffer's kind": lambda model, call: model.register_buffer("shift", model.shift, persistent=False),
    "plain tensor": lambda model, call: model.table.add_(1),
    "function": lambda model, call: setattr(model, "act", doubled),
    "closure": lambda model, call: setattr(model, "act", (lambda n: lambda x: x * n)(3)),
    "other closure": lambda model, call: setattr(model, "act", (lambda n: lambda x: x * n)(4)),
    "length": lambda model, call: call.update(x=torch.randn(3, 6, 6)),
    "value": lambda model, call: call["x"].add_(1),
    "argument": lambda model, call: call.update(twice=True),
    "argument left out": lambda model, call: call.pop("mask"),
    "meta": lambda model, call: model.to("meta"),
}


def test_everything_that_a_trace_depends_on_makes_another_key() -> None:
    assert key() == key()
    keys = {"nothing": key(), **{name: key(change) for name, change in CHANGES.items()}}
    keys["option"] = key(verify="off")
    assert len(set(keys.values())) == len(keys), sorted(keys.items(), key=lambda one: one[1])


def replaced(self: Any, x: Tensor, mask: Tensor | None = None, twice: bool = False) -> dict[str, Tensor]:
    return {"h": self.first(x), "picked": x}


def test_code_and_versions_make_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key()]
    for target, name, value in (
        (Net, "forward", replaced),
        (nn.Linear, "forward", lambda self, x: x @ self.weight.t()),
        (model_identity.sys.modules[__name__], "FACTOR", 3.0),
        (model_identity.sys.modules[__name__], "scaled", doubled),
        (torch, "__version__", "99.1"),
        (model_identity, "own_source", lambda: "other"),
        (model_identity, "loaded_sources", lambda: {"model.py": "other"}),
        (model_identity.platform, "python_version", lambda: "3.99"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, value)
            keys.append(key())
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, call: model.first.register_forward_hook(lambda *_: None),
        lambda model, call: setattr(model.first, "forward", lambda x: x),
        lambda model, call: setattr(model, "act", partial(torch.add, 1)),
        lambda model, call: setattr(model, "numbers", iter([1])),
        lambda model, call: setattr(model, "other", [nn.Linear(2, 2)]),
        lambda model, call: setattr(model, "log", threading.Lock()),
    ],
)
def test_what_cannot_be_described_is_not_kept(change: Callable[[Net, dict[str, Any]], object]) -> None:
    with pytest.raises(NotIdentifiable):
        key(change)
    assert key(lambda model, call: setattr(model, "fine", SimpleNamespace(a=[1])))


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient / 2


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Halved.apply(self.linear(x))


def test_a_program_that_is_no_plain_data_is_not_kept_and_the_progress_says_so(tmp_path: Path) -> None:
    told: list[str] = []
    traced(OwnFunction(), tmp_path, {"x": torch.randn(3, 4)}, progress=lambda phase, *_: told.append(phase))
    assert cached_files(tmp_path) == []
    assert any(one.startswith("not kept for later: ") for one in told)


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    for age, name in enumerate(("c", "a", "b")):
        (tmp_path / f"{name}.trace").write_bytes(b"x" * 10)
        os.utime(tmp_path / f"{name}.trace", (1000 + age, 1000 + age))
    make_room(tmp_path, 25)
    assert [path.stem for path, _ in cached_files(tmp_path)] == ["a", "b"]
    make_room(tmp_path, 5)
    assert [path.stem for path, _ in cached_files(tmp_path)] == ["b"]  # the newest stays
    assert clear(tmp_path) == (1, 10)
    assert clear(tmp_path / "nowhere") == (0, 0)


def test_a_reader_beside_a_writer_sees_whole_files_only(tmp_path: Path) -> None:
    from peftgraph.capture.trace_cache import store_trace

    program = traced(Net(), tmp_path / "other")
    done = threading.Event()

    def write() -> None:
        for _ in range(20):
            store_trace(tmp_path, "one", program, True)
        done.set()

    assert store_trace(tmp_path, "one", program, True) == ""
    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert find_trace(tmp_path, "one") is not None
    writer.join()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["one.trace"]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told: list[str] = []
    program = traced(Net(), tmp_path / "file", progress=lambda phase, *_: told.append(phase))
    assert len(program.sites) > 0
    assert any(one.startswith("not kept for later: ") for one in told)


OF_A_PROCESS = """
from transformers import LlamaConfig, LlamaForCausalLM
from peftgraph.capture.example_inputs import bind_example
from peftgraph.capture.model_identity import identity
import torch
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
print(identity(model, bind_example(model, {"input_ids": torch.ones(3, 5, dtype=torch.long)}), {}))
"""


def test_a_library_model_has_one_key_in_every_process() -> None:
    keys: set[str] = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", OF_A_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        keys.add(done.stdout.strip())
    assert len(keys) == 1
