"""An adapter that was there survives everything: full disks, kills between any two steps, damage of any byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import faults
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftgraph as pg
from peftgraph.interop.native import INDEX
from peftgraph.passes import LoRA
from peftgraph.utils import atomic_files

Format = Literal["peftgraph", "peft"]
FORMATS: tuple[Format, ...] = ("peftgraph", "peft")


@cache
def base() -> pg.Program:
    torch.manual_seed(0)
    return pg.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), (torch.randn(2, 4),))


@cache
def tuned(value: float) -> pg.Program:
    program = base().apply(LoRA(at="projection|head", rank=2))
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.fill_(value)
    return program


def held(directory: Path) -> float:
    """The value that the adapter of a directory holds everywhere."""
    tensors = base().load_adapter(directory).table.trainable.values()
    (value,) = {value for tensor in tensors for value in tensor.detach().unique().tolist()}
    return value


def old_one(folder: Path, form: Format) -> Callable[[], Any]:
    """Puts the old adapter into a new folder; what saves the new one over it."""
    shutil.rmtree(folder, ignore_errors=True)
    tuned(1.0).save_adapter(folder / "adapter", format=form)
    return lambda: tuned(2.0).save_adapter(folder / "adapter", format=form)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(params=[True, False], ids=["one-step", "two-steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system can exchange two folders in one step."""
    if not request.param:
        monkeypatch.setattr(atomic_files, "_exchange", lambda a, b: False)
    return request.param


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "once"])
def test_every_write_that_fails_leaves_the_old_adapter_or_the_new_one(
    form: Format, full: bool, exchange: bool, tmp_path: Path
) -> None:
    count = faults.steps(old_one(tmp_path / "a", form))
    assert count > 8
    for at in range(1, count + 1):
        save = old_one(tmp_path / "a", form)
        before = names(tmp_path / "a")
        with faults.failing(at, full):
            try:
                save()
                saved = 2.0
            except pg.PeftGraphError as error:
                assert "No space left on device" in str(error)
                saved = 1.0
        assert held(tmp_path / "a" / "adapter") == saved, at
        save()
        assert held(tmp_path / "a" / "adapter") == 2.0
        assert len(names(tmp_path / "a")) == len(before), (at, names(tmp_path / "a"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_kill_between_any_two_steps_leaves_one_of_them_and_no_litter_for_long(
    form: Format, exchange: bool, tmp_path: Path
) -> None:
    count = faults.steps(old_one(tmp_path / "a", form))
    seen: list[float] = []
    for at in range(1, count + 1):
        save = old_one(tmp_path / "a", form)
        before = names(tmp_path / "a")
        faults.killed(at, save)
        seen.append(held(tmp_path / "a" / "adapter"))
        save()
        assert held(tmp_path / "a" / "adapter") == 2.0
        assert len(names(tmp_path / "a")) == len(before), (at, names(tmp_path / "a"))
    assert seen == sorted(seen)
    assert set(seen) == {1.0, 2.0}


def test_the_first_save_may_be_killed_too(tmp_path: Path) -> None:
    def save() -> Path:
        return tuned(2.0).save_adapter(tmp_path / "a" / "adapter")

    for at in range(1, faults.steps(save) + 1):
        shutil.rmtree(tmp_path / "a")
        faults.killed(at, save)
        save()
        assert held(tmp_path / "a" / "adapter") == 2.0
        assert len(names(tmp_path / "a")) == 3


def test_litter_of_a_writer_that_lives_stays(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with atomic_files.temporary_folder(tmp_path / "adapter" / "other") as folder:
        (folder / "mine").write_text("not finished")
        tuned(1.0).save_adapter(tmp_path / "adapter")
        assert (folder / "mine").read_text() == "not finished"
    assert not folder.exists()


def test_two_writers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_files.folder_lock(tmp_path / "adapter", "saving"):
        monkeypatch.setattr(atomic_files, "_lock", lambda folder: None)
        with (
            pytest.raises(pg.PeftGraphError, match=r"Another process is saving.*Wait until it is done"),
            atomic_files.folder_lock(tmp_path / "adapter", "saving", 0.0),
        ):
            pass


def refused(directory: Path) -> None:
    with pytest.raises(pg.PeftGraphError):
        base().load_adapter(directory)


def test_every_byte_that_is_missing_is_noticed(tmp_path: Path) -> None:
    directory = tuned(1.0).save_adapter(tmp_path / "adapter")
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            refused(directory)
        path.write_bytes(content)
    assert held(directory) == 1.0


def test_every_byte_that_is_another_is_noticed(tmp_path: Path) -> None:
    directory = tuned(1.0).save_adapter(tmp_path / "adapter")
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), 3):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            if path.name == INDEX and content[place : place + 1].isspace():
                continue  # white space says nothing, whatever it is
            refused(directory)
        path.write_bytes(content)
    assert held(directory) == 1.0


def test_peft_files_that_are_cut_are_refused(tmp_path: Path) -> None:
    directory = tuned(1.0).save_adapter(tmp_path / "adapter", format="peft")
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        for length in range(0, len(content), 5):
            path.write_bytes(content[:length])
            refused(directory)
        path.write_bytes(content)
    assert held(directory) == 1.0


DAMAGED: list[tuple[str, Any]] = [
    *((key, value) for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "layers_pattern",
                               "layers_to_transform", "exclude_modules", "modules_to_save", "trainable_token_indices",
                               "use_rslora", "target_parameters", "peft_type", "bias")
      for value in (5, -1, 1e300, "(", "((a|aa)+)+$", [[]], [None], {"(": 3}, {"0": True}, {"2": [0]}, {"": [10**9]})),
]  # fmt: skip


def test_options_of_peft_that_are_damaged_are_refused_or_read(tmp_path: Path) -> None:
    directory = tuned(1.0).save_adapter(tmp_path / "adapter", format="peft")
    path = directory / "adapter_config.json"
    options = json.loads(path.read_text())
    refusals = 0
    for key, value in DAMAGED:
        path.write_text(json.dumps(options | {key: value}))
        try:
            base().load_adapter(directory)
        except pg.PeftGraphError:
            refusals += 1
    assert refusals > len(DAMAGED) // 2


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (1, 1, 1), (40, 40)])
def test_tensors_of_peft_that_are_damaged_are_refused(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    directory = tuned(1.0).save_adapter(tmp_path / "adapter", format="peft")
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        for change in (torch.zeros(shape), tensors[key].to(dtype), None):
            rest = {name: value for name, value in tensors.items() if name != key}
            save_file(rest if change is None else rest | {key: change}, path)
            refused(directory)
    save_file(tensors | {"base_model.model." + "x" * 5000: torch.zeros(1)}, path)
    refused(directory)
