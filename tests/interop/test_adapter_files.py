"""Adapter directories: bit-exact, atomic, and suspicious of everything they read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

import peftgraph as pg
from peftgraph.interop.native import checksum
from peftgraph.passes.bitfit import BitFit
from peftgraph.passes.lora import LoRA

METHODS = (LoRA(at="attention.*", rank=2), BitFit(), LoRA(at="ffn.*", rank=3, name="wide"))


@pytest.fixture(scope="module")
def tuned() -> pg.Program:
    return zoo.randomise(zoo.traced("nano").apply(*METHODS))


@pytest.fixture
def saved(tuned: pg.Program, tmp_path: Path) -> Path:
    return tuned.save_adapter(tmp_path / "adapter")


def refused(directory: Path, words: str, program: pg.Program | None = None, error: type = pg.AdapterError) -> None:
    """Loading raises `words` and changes nothing."""
    program = program or zoo.traced("nano")
    text, hashes, rng = program.text(), program.table.hashes(), torch.get_rng_state()
    with pytest.raises(error, match=words):
        program.load_adapter(directory)
    assert program.text() == text
    assert program.table.hashes() == hashes
    assert torch.equal(torch.get_rng_state(), rng)


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the index, and notes the right checksum where there still is one."""
    path = directory / "adapter.json"
    document = json.loads(path.read_text())
    (tensors,) = directory.glob("*.safetensors")
    noted = document["sha256"]
    change(document)
    if document.get("sha256") == noted:
        document["sha256"] = checksum(document, tensors.read_bytes())
    path.write_text(json.dumps(document))


def retensor(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Replaces the tensors and gives them a valid checksum."""
    document = json.loads((directory / "adapter.json").read_text())
    path = directory / document["tensors"]["file"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(directory, lambda doc: None)


# the round trip


def test_bit_exact_round_trip(tuned: pg.Program, saved: Path) -> None:
    loaded = zoo.traced("nano").load_adapter(saved)
    assert loaded.table.hashes() == tuned.table.hashes()
    assert loaded.text() == tuned.text()
    assert str(loaded.recipe) == str(tuned.recipe)
    inputs = zoo.example("nano", 2, 5)
    assert torch.equal(loaded.module().eval()(**inputs)["logits"], tuned.module().eval()(**inputs)["logits"])


def test_loading_leaves_the_random_generator_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    zoo.traced("nano").load_adapter(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_again_replaces(tuned: pg.Program, saved: Path) -> None:
    other = zoo.randomise(zoo.traced("nano").apply(LoRA(rank=1)))
    (saved / "adapter-notes.safetensors").write_bytes(b"somebody else's")
    assert other.save_adapter(saved) == saved
    names = sorted(path.name for path in saved.iterdir())
    assert len(names) == 3
    assert "adapter-notes.safetensors" in names
    assert zoo.traced("nano").load_adapter(saved).table.hashes() == other.table.hashes()
    other.save_adapter(saved)
    assert sorted(path.name for path in saved.iterdir()) == names


def test_names(tuned: pg.Program, tmp_path: Path) -> None:
    one = zoo.randomise(zoo.traced("nano").apply(LoRA(rank=2)))
    one.save_adapter(tmp_path)
    with pytest.raises(pg.Conflict, match=r"exists already.*names of their own: name="):
        one.load_adapter(tmp_path)
    both = one.load_adapter(tmp_path, name="second")
    for name, parameter in one.table.trainable.items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(both.table[f"{path}.second.{leaf}"].tensor, parameter)
    with pytest.raises(pg.Conflict, match="are both a lora called 'second'"):
        both.load_adapter(tmp_path, name="second")
    tuned.save_adapter(tmp_path / "three")
    with pytest.raises(pg.AdapterError, match="holds more than one lora; one name cannot stand for both"):
        zoo.traced("nano").load_adapter(tmp_path / "three", name="x")


def test_renaming_does_not_rely_on_the_order_of_the_file(tmp_path: Path) -> None:
    program = pg.trace(zoo.Nano(width=12, heads=2, inner=8, layers=11), zoo.example("nano"))
    tuned = zoo.randomise(program.apply(LoRA(at="attention.o", rank=1)))
    tuned.save_adapter(tmp_path)
    loaded = program.load_adapter(tmp_path, name="again")
    for name, parameter in tuned.table.trainable.items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(loaded.table[f"{path}.again.{leaf}"].tensor, parameter)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(pg.AdapterError, match="nothing to save: no pass was applied"):
        zoo.traced("nano").save_adapter(tmp_path)


def test_a_partial_fold_cannot_be_saved(tmp_path: Path) -> None:
    from peftgraph.passes.serial_adapter import SerialAdapter

    tuned = zoo.traced("nano").apply(LoRA(at="attention.v", rank=2), SerialAdapter(width=3))
    left = pg.fold(zoo.randomise(tuned), partial=True)
    with pytest.raises(pg.AdapterError, match=r"partial fold changed .*weight.*Save the adapter before folding"):
        left.save_adapter(tmp_path)
    assert list(tmp_path.iterdir()) == []


# a disk that refuses


@pytest.mark.parametrize("when", [0, 1], ids=["tensors", "index"])
def test_a_full_disk_leaves_the_old_adapter(
    when: int, tuned: pg.Program, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = zoo.randomise(zoo.traced("nano").apply(LoRA(rank=1)))
    calls, replace = iter(range(9)), os.replace

    def full(*args: Any) -> None:
        if next(calls) == when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*args)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(pg.PeftGraphError, match="cannot be written: No space left on device. Nothing was changed"):
        other.save_adapter(saved)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert zoo.traced("nano").load_adapter(saved).table.hashes() == tuned.table.hashes()


def test_a_directory_that_is_a_file(tuned: pg.Program, tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("I am a file")
    with pytest.raises(pg.PeftGraphError, match="cannot be written"):
        tuned.save_adapter(tmp_path / "adapter")
    refused(tmp_path / "adapter", "damaged|no adapter directory")


# another base


def test_another_base_is_refused_by_its_first_difference(saved: Path) -> None:
    refused(saved, r"fits another base: the adapter's base Nano has a parameter tok.weight; this BertModel has none",
            zoo.traced("bert"))  # fmt: skip
    narrow = pg.trace(zoo.Nano(width=36), zoo.example("nano"))
    refused(saved, r"tok.weight has shape \(61, 48\) in the adapter's base Nano and \(61, 36\) in this Nano", narrow)
    deep = pg.trace(zoo.Nano(layers=3), zoo.example("nano"))
    refused(saved, r"this Nano has a parameter stack.2.n1.weight; the adapter's base Nano has none", deep)


def test_another_class_of_the_same_parameters(saved: Path) -> None:
    class Other(zoo.Nano):
        pass

    refused(saved, "same parameters but are different classes", pg.trace(Other(), zoo.example("nano")))


# damage and malice


def test_missing_and_truncated_files(saved: Path) -> None:
    refused(saved / "nowhere", "contains no adapter.json, so it is no adapter directory")
    (tensors,) = saved.glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    refused(saved, r"safetensors or adapter.json beside it is damaged: their checksum is not the one that is noted")
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(saved, "their checksum is not the one")
    tensors.unlink()
    refused(saved, "safetensors is missing")
    (saved / "adapter.json").write_bytes(b"\xff\xfe{")
    refused(saved, "adapter.json is damaged")


HOSTILE_TEXT = {
    "deep": "[" * 100_000,
    "truncated": '{"format": 1, "recipe": [',
    "nan": '{"format": NaN}',
    "infinity": '{"format": 1, "base": {"parameters": {"w": [Infinity]}}}',
    "huge": '{"format": ' + "9" * 5000 + "}",
    "long": '{"format": ' + "9" * 21 + "}",
    "large": '{"format": 1e999}',
    "empty": "",
}


@pytest.mark.parametrize("text", HOSTILE_TEXT.values(), ids=list(HOSTILE_TEXT))
def test_hostile_json(text: str, saved: Path) -> None:
    (saved / "adapter.json").write_text(text)
    refused(saved, r"adapter.json is damaged: .+")


HOSTILE_PARTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda d: d.update(format=1), "has format 1; this version reads format 2"),
    "format-kind": (lambda d: d.update(format=True), "it names no format"),
    "recipe": (lambda d: d.update(recipe=["x", 3]), "its 'recipe' is missing or of the wrong kind"),
    "no-recipe": (lambda d: d.pop("recipe"), "its 'recipe' is missing or of the wrong kind"),
    "shape": (lambda d: d["base"]["parameters"].update(w=[1.5]), "its 'base' is missing or of the wrong kind"),
    "model": (lambda d: d["base"].update(model=None), "its 'base' is missing or of the wrong kind"),
    "names": (lambda d: d["tensors"].update(names={}), "its 'tensors' is missing or of the wrong kind"),
    "traversal": (lambda d: d["tensors"].update(file="../a.safetensors"), r"beside adapter.json, not in '../a"),
    "absolute": (lambda d: d["tensors"].update(file="/etc/passwd"), "beside adapter.json, not in '/etc/passwd'"),
    "zero-byte": (lambda d: d["tensors"].update(file="adapter-\0.safetensors"), "is damaged: embedded null byte"),
    "checksum": (lambda d: d.update(sha256="0"), "their checksum is not the one"),
    "no-checksum": (lambda d: d.pop("sha256"), "its 'sha256' is missing or of the wrong kind"),
    "unknown-pass": (lambda d: d["recipe"].append("evil{}"), "its recipe cannot be read: There is no pass 'evil'"),
    "bad-spec": (lambda d: d["recipe"].append("lora{rank=}"), "its recipe cannot be read: expected key=value"),
    "bad-option": (lambda d: d["recipe"].append("lora{rank=x}"), "its recipe cannot be read: .*'rank'"),
    "deep-spec": (lambda d: d["recipe"].append(f"lora{{at={'(' * 50000}}}"), "its recipe cannot be read"),
    "more-passes": (lambda d: d["recipe"].append('lora{rank=1 name="more"}'), "is not in the file"),
    "fewer-passes": (lambda d: d["recipe"].pop(), "belongs to no parameter of the recipe"),
    "wide": (lambda d: d["recipe"].append("serial_adapter{width=9000000000000}"), "its recipe cannot be applied"),
}


@pytest.mark.parametrize(("change", "words"), HOSTILE_PARTS.values(), ids=list(HOSTILE_PARTS))
def test_hostile_parts(change: Callable[[dict[str, Any]], Any], words: str, saved: Path) -> None:
    edit(saved, change)
    refused(saved, words)


FIRST = "stack.0.mix.q.lora_A"
HOSTILE_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "extra": (lambda t: t.update(more=torch.ones(1)), "more belongs to no parameter of the recipe"),
    "missing": (lambda t: t.pop(FIRST), f"{FIRST} is not in the file"),
    "shape": (
        lambda t: t.update({FIRST: torch.ones(3, 3)}),
        rf"{FIRST} has shape \(3, 3\), the recipe makes \(2, 48\)",
    ),
    "kind": (lambda t: t.update({FIRST: torch.ones(2, 48, dtype=torch.int8)}), "holds torch.int8, which cannot train"),
}


@pytest.mark.parametrize(("change", "words"), HOSTILE_TENSORS.values(), ids=list(HOSTILE_TENSORS))
def test_hostile_tensors(change: Callable[[dict[str, torch.Tensor]], Any], words: str, saved: Path) -> None:
    retensor(saved, change)
    refused(saved, words)


def test_tensors_that_are_no_safetensors(saved: Path) -> None:
    (tensors,) = saved.glob("*.safetensors")
    tensors.write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    edit(saved, lambda d: None)
    refused(saved, "safetensors is damaged: ")


# one checksum of both files


@pytest.mark.parametrize("change", ["rank=2", '"Nano"', "[\n    48", "lora_A"])
def test_the_index_is_under_the_checksum(change: str, saved: Path) -> None:
    path = saved / "adapter.json"
    text = path.read_text()
    assert change in text
    path.write_text(
        text.replace(change, change[:-1] + ("3" if change[-1].isdigit() else "x") + change[len(change) :], 1)
    )
    refused(saved, "damaged")


# what blocks, or says two things


def test_pipes_are_not_waited_for(saved: Path) -> None:
    for path in list(saved.iterdir()):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(saved, "is damaged: .*no regular file")
        path.unlink()
        path.write_bytes(content)


def test_devices_are_not_read(saved: Path) -> None:
    (saved / "adapter.json").unlink()
    (saved / "adapter.json").symlink_to("/dev/zero")
    refused(saved, "no regular file")


def test_a_key_that_stands_twice(saved: Path) -> None:
    path = saved / "adapter.json"
    path.write_text(path.read_text().replace('"recipe":', '"recipe": ["lora{}"], "recipe":', 1))
    refused(saved, "the key 'recipe' occurs twice")


@pytest.mark.parametrize("where", [5, None, b"adapter", ["a"], "a\0b", object()])
def test_what_is_no_directory(where: Any) -> None:
    refused(where, "An adapter is stored in a directory")


@pytest.mark.parametrize("name", [5, b"x", ["x"]])
def test_what_is_no_name(name: Any, saved: Path) -> None:
    with pytest.raises(pg.AdapterError, match="name of an adapter is text"):
        zoo.traced("nano").load_adapter(saved, name=name)
