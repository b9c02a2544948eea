"""Merging shard by shard: the bits of write_back, few tensors in memory, refusals before anything is written."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import sharded
import torch
import zoo
from sharded import contents, differing, own_updates, silent
from torch import Tensor

import peftgraph as pg
from peftgraph.interop.checkpoints import shard_writer
from peftgraph.interop.checkpoints.checkpoint import INDEX, Checkpoint
from peftgraph.interop.checkpoints.folded_updates import FoldedUpdates
from peftgraph.interop.checkpoints.shard_writer import check_space, identity, write_shards
from peftgraph.interop.checkpoints.tensor_file import TensorFile

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "bert": ("lora{rank=2}; ia3{}; bitfit{}", F32),
    # Its head is tied and stored once.
    "llama": ("lora{rank=2 at=attention.*|ffn.*}; ia3{}; trainable_tokens{tokens=[5, 7]}", BF16),
    "gpt2": ("dora{rank=2 at=attention.*|ffn.*}; bitfit{at=attention.q}", BF16),  # fused and transposed
    "roberta": ('train{at=embedding|layers(1)}; lora{rank=2 init="pissa"}', F16),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint, FoldedUpdates]:
    """A small BERT in shards, and an adapter's updates of it."""
    folder = tmp_path_factory.mktemp("shards")
    sharded.saved("bert", folder / "model")
    tuned = zoo.randomise(zoo.traced("bert").apply(pg.load_recipe("lora{rank=2}; ia3{}")))
    return folder, *own_updates(folder / "model", tuned.save_adapter(folder / "adapter"))


@pytest.mark.parametrize("name", CASES)
def test_shards_hold_the_bits_of_write_back(name: str, tmp_path: Path) -> None:
    recipe, dtype = CASES[name]
    folder = sharded.saved(name, tmp_path / "model", dtype)
    tuned = zoo.randomise(zoo.traced(name, dtype=dtype).apply(pg.load_recipe(recipe)))
    checkpoint, updates = own_updates(folder, tuned.save_adapter(tmp_path / "adapter"))
    out = tmp_path / "merged"
    assert len(checkpoint.files) > 2
    assert write_shards(checkpoint, updates, out, silent) == 0
    pg.fold(tuned).write_back(zoo.build(name, dtype=dtype)).save_pretrained(tmp_path / "whole")  # pyright: ignore
    assert differing(contents(out), contents(tmp_path / "whole")) == []
    assert set(differing(contents(out), contents(folder))) == updates.changed.keys()
    for path in out.iterdir():
        assert path.stat().st_size == (folder / path.name).stat().st_size
    assert (out / INDEX).read_bytes() == (folder / INDEX).read_bytes()


def test_few_tensors_are_in_memory_at_once(
    bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint, updates = bert
    alive: list[str] = []
    most: list[int] = []
    read = TensorFile.read

    def counted(self: TensorFile, name: str, lend: Callable[[int], Tensor]) -> Tensor:
        tensor = read(self, name, lend)
        alive.append(name)
        weakref.finalize(tensor, alive.remove, name)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(TensorFile, "read", counted)
    write_shards(checkpoint, updates, tmp_path, silent, limit=0)
    wanted = [len(sources) for sources in updates.changed.values()]
    assert max(wanted) == 2  # (IA)3 scales a weight and its bias together
    assert max(most) == 2
    assert len(most) == sum(wanted)
    assert alive == []


class Stop(BaseException):
    """What stands for an interruption."""


def stopping(after: int) -> Callable[[int], None]:
    """A progress that stops the merge once so many bytes were written."""
    written = [0]

    def wrote(count: int) -> None:
        written[0] += count
        if written[0] > after:
            raise Stop

    return wrote


def test_an_interrupted_merge_goes_on_with_the_shard_it_stopped_in(
    bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path
) -> None:
    _, checkpoint, updates = bert
    write_shards(checkpoint, updates, tmp_path / "whole", silent)
    sizes = [file.size for file in checkpoint.files]
    for finished in range(len(sizes)):
        out = tmp_path / f"stopped-{finished}"
        with pytest.raises(Stop):
            write_shards(checkpoint, updates, out, stopping(sum(sizes[:finished]) + sizes[finished] // 2))
        assert len(list(out.glob("*.safetensors"))) == finished
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        counts: list[int] = []
        assert write_shards(checkpoint, updates, out, counts.append) == finished
        assert sum(counts) == checkpoint.size
        assert all(path.stat().st_mtime_ns == at for path, at in before.items())
        assert differing(contents(out), contents(tmp_path / "whole")) == []


def test_a_merge_is_known_by_what_it_is_made_of(bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path) -> None:
    folder, checkpoint, _ = bert
    adapter = sorted((folder / "adapter").iterdir())
    first = identity(checkpoint, adapter)
    assert identity(Checkpoint.open(folder / "model"), adapter) == first
    other = tmp_path / adapter[0].name
    other.write_bytes(adapter[0].read_bytes() + b" ")
    assert identity(checkpoint, [other, *adapter[1:]]) != first
    copied = shutil.copytree(folder / "model", tmp_path / "model", copy_function=shutil.copyfile)
    assert identity(Checkpoint.open(copied), adapter) != first  # the same bytes, written at another time


def test_a_full_disk_is_seen_before(
    bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint, _ = bert
    needed = shutil.disk_usage(tmp_path)._replace(free=checkpoint.size - 1)
    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda path: needed)
    with pytest.raises(pg.PeftGraphError, match="GB are free at"):
        check_space(checkpoint, tmp_path / "new", tmp_path / "work")
    (tmp_path / "part.safetensors").write_bytes(b"1")
    check_space(checkpoint, tmp_path / "new", tmp_path)  # what is finished takes no more room


def damaged(bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path) -> tuple[Path, Path, str]:
    """A copy of the model, its first shard, and a tensor that the adapter changes there."""
    folder, checkpoint, updates = bert
    copied = shutil.copytree(folder / "model", tmp_path / "model")
    shard = copied / checkpoint.files[0].path.name
    return copied, shard, next(name for name in checkpoint.files[0].slots if name in updates.changed)


def rewritten(shard: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(shard)
    change(tensors)
    safetensors.torch.save_file(tensors, shard)


def test_damaged_models_are_refused(bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path) -> None:
    copied, shard, _ = damaged(bert, tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(pg.PeftGraphError, match="no whole safetensors file"):
        Checkpoint.open(copied)
    shard.unlink()
    with pytest.raises(pg.PeftGraphError, match="no whole safetensors file"):
        Checkpoint.open(copied)
    shard.write_bytes(whole)
    index = json.loads((copied / INDEX).read_text())
    index["weight_map"]["ghost"] = shard.name
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(pg.PeftGraphError, match="holds ghost, which it does not"):
        Checkpoint.open(copied)
    index["weight_map"] = {"ghost": "../elsewhere.safetensors"}
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(pg.PeftGraphError, match="no safetensors file beside it"):
        Checkpoint.open(copied)
    (copied / INDEX).unlink()
    with pytest.raises(pg.PeftGraphError, match="Pickled weights are not read"):
        Checkpoint.open(copied)


def test_quantised_models_are_refused(bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path) -> None:
    copied, _, _ = damaged(bert, tmp_path)
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(pg.PeftGraphError, match=r"quantised weights \(gptq\)"):
        Checkpoint.open(copied)


def test_tensors_that_do_not_fit_are_refused(bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path) -> None:
    copied, shard, name = damaged(bert, tmp_path)
    adapter, whole = bert[0] / "adapter", shard.read_bytes()
    index = json.loads((copied / INDEX).read_text())
    rewritten(shard, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(pg.PeftGraphError, match=f"{name} is stored as I8"):
        own_updates(copied, adapter)
    shard.write_bytes(whole)
    rewritten(shard, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(pg.PeftGraphError, match=rf"{name} has shape \(\d+.*the adapter fits"):
        own_updates(copied, adapter)
    shard.write_bytes(whole)
    rewritten(shard, lambda tensors: tensors.pop(name))
    index["weight_map"].pop(name)
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(pg.PeftGraphError, match=f"stores no {name}"):
        own_updates(copied, adapter)


def test_what_does_not_fold_is_refused(bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path) -> None:
    tuned = zoo.traced("bert").apply(pg.load_recipe("serial_adapter{width=4}"))
    with pytest.raises(pg.NoFold, match="it is nonlinear"):
        own_updates(bert[0] / "model", tuned.save_adapter(tmp_path / "adapter"))


def test_a_model_that_changed_meanwhile_is_noticed(
    bert: tuple[Path, Checkpoint, FoldedUpdates], tmp_path: Path
) -> None:
    copied, shard, _ = damaged(bert, tmp_path)
    checkpoint = Checkpoint.open(copied)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(pg.PeftGraphError, match="has changed"):
        write_shards(checkpoint, bert[2], tmp_path / "out", silent)
    assert not list((tmp_path / "out").iterdir())


def test_a_bare_model_may_be_stored_with_its_prefix_and_without(bert: tuple[Path, Checkpoint, FoldedUpdates]) -> None:
    _, checkpoint, _ = bert
    name = "embeddings.word_embeddings.weight"
    assert checkpoint.key([name], "bert") == name
    assert checkpoint.key([f"bert.{name}"], "bert") == name
    assert checkpoint.key([f"bert.{name}"]) is None
    assert checkpoint.key(["unknown", name]) == name
