"""Modules of many adapters: names, swapping, loading on demand, generation, other dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, LoRA, Prefix

F64 = torch.float64


def trained(program: pg.Program, seed: int) -> pg.Program:
    """A program with parameters as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in program.table.trainable.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator).to(value.dtype))
    return program


@pytest.fixture(scope="module")
def base() -> pg.Program:
    return zoo.traced("llama", "sdpa", F64)


@pytest.fixture(scope="module")
def tuned(base: pg.Program) -> dict[str, pg.Program]:
    recipes = {"a": LoRA(rank=4), "b": LoRA(rank=6, alpha=9.0), "c": IA3()}
    return {name: trained(base.apply(one), i) for i, (name, one) in enumerate(recipes.items())}


def example(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return zoo.example("llama", rows, 6, F64)


def same(net: Any, ids: Any, *alone: pg.Program) -> bool:
    """Whether each row is what its adapter computes alone."""
    inputs = example(len(alone))
    found = net(**inputs, adapter_ids=ids).logits
    own = torch.stack([one.module().eval()(**inputs).logits[row] for row, one in enumerate(alone)])
    return bool((found - own).abs().max() <= 1e-9)


def test_rows_are_named_in_every_way(base: pg.Program, tuned: dict[str, pg.Program]) -> None:
    net: Any = base.serve(tuned).module().eval()
    assert net.adapters == {"a": 1, "b": 2, "c": 3}
    for ids in (["a", None, "c"], [1, 0, 3], torch.tensor([1, 0, 3]), ("a", "", "c")):
        assert same(net, ids, tuned["a"], base, tuned["c"])
    assert same(net, "b", tuned["b"], tuned["b"])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "dog"], "row 1 names 'dog', which is no adapter of this module"),
        ([0, 9], "row 1 has 9; adapters have the numbers 1 to 3"),
        ([-1, 1], "row 0 has -1"),
        ([True, 1], "row 0 names True"),
        (["a"], "adapter_ids has size 1 in dimension 0, input_ids has 2"),
        (torch.tensor([1.0, 2.0]), "dtype torch.float32"),
        (torch.tensor([[1, 2]]), "adapter_ids has 2 dimensions"),
        ({"a": 1}, "a name or number for each row, got dict"),
    ],
)
def test_rows_that_name_nothing(base: pg.Program, tuned: dict[str, pg.Program], ids: Any, words: str) -> None:
    net = base.serve(tuned).module().eval()
    with pytest.raises(pg.CallError, match=words):
        net(**example(2), adapter_ids=ids)


def test_swapping(base: pg.Program, tuned: dict[str, pg.Program], tmp_path: Path) -> None:
    served = base.serve(tuned, slots=3)
    net: Any = served.module().eval()
    other, third = (trained(base.apply(LoRA(rank=r, alpha=float(r), name="x")), r) for r in (3, 5))
    net.swap("a", other.save_adapter(tmp_path / "own"))
    net.swap("new", trained(third, 1).save_adapter(tmp_path / "peft", format="peft"))
    assert same(net, ["new", "b", "a", 0], third, tuned["b"], other, base)
    net.swap("b", tuned["c"])  # another method
    assert same(net, ["b", "c", "a"], tuned["c"], tuned["c"], other)
    assert same(served.module().eval(), ["a", "b"], tuned["a"], tuned["b"])  # other modules keep theirs
    before = net(**example(2), adapter_ids=["a", "b"]).logits
    for adapter, words in (
        (base.apply(LoRA(at="attention.k", rank=2)), "fits no graph of this module"),
        (base.apply(BitFit(at="norm", zero=True, norms=True)), "fits no graph of this module"),
        (tmp_path / "nothing", "nothing"),
        (zoo.traced("gpt2", "sdpa", F64).apply(LoRA(rank=2)), "another base"),
    ):
        with pytest.raises(pg.PeftGraphError, match=words):
            net.swap("a", adapter)
    assert torch.equal(before, net(**example(2), adapter_ids=["a", "b"]).logits)
    larger = trained(base.apply(LoRA(rank=11)), 7)
    net.swap("a", larger)
    assert same(net, ["a", "new", "b"], larger, third, tuned["c"])
    assert same(served.module("infer").eval(), ["a", "b"], tuned["a"], tuned["b"])


def test_more_adapters_than_room(base: pg.Program, tmp_path: Path) -> None:
    """Those that rows name are loaded, the least recently used leave, and a damaged one is refused by row."""
    programs = {f"t{i}": trained(base.apply(LoRA(rank=2 + i % 3, alpha=4.0 + i)), i) for i in range(6)}
    folders = {name: one.save_adapter(tmp_path / name) for name, one in programs.items()}
    net: Any = base.serve(folders, slots=3).module().eval()
    assert set(net._peftgraph_serving.loaded) == {1, 2, 3}
    assert same(net, ["t5", 0, "t4"], programs["t5"], base, programs["t4"])
    assert set(net._peftgraph_serving.loaded) == {3, 5, 6}
    assert same(net, ["t2", "t5", "t0"], programs["t2"], programs["t5"], programs["t0"])
    with pytest.raises(pg.CallError, match="names 4 adapters of one kind, and there is room for 3"):
        net(**example(4), adapter_ids=["t0", "t1", "t2", "t3"])
    (tmp_path / "t1" / "adapter.json").write_text("{")
    with pytest.raises(pg.AdapterError, match="row 1 needs 't1'.* is damaged"):
        net(**example(2), adapter_ids=["t0", "t1"])
    assert same(net, ["t0", "t3"], programs["t0"], programs["t3"])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_with_a_cache_and_beams(name: str) -> None:
    base = zoo.cached(name, F64)
    tuned = {"a": LoRA(rank=2), "b": Prefix(length=3, hidden=4), "c": IA3()}
    programs = {key: trained(base.apply(one), i) for i, (key, one) in enumerate(tuned.items())}
    net: Any = base.serve(programs).module().eval()
    ids = torch.randint(3, zoo.VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "num_beams": 2}
    found = net.generate(input_ids=ids, attention_mask=mask, adapter_ids=["c", "a", "b"], **options)
    for row, key in enumerate("cab"):
        one: Any = programs[key].module().eval()
        own = one.generate(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(found[row], own[0])


def test_half_precision_and_a_moved_module(base: pg.Program, tuned: dict[str, pg.Program]) -> None:
    inputs = example(3)
    net: Any = base.serve(tuned).module().eval()
    wide = net(**inputs, adapter_ids=["a", "b", 0]).logits
    narrow = net.to(torch.bfloat16)(**inputs, adapter_ids=["a", "b", 0]).logits
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).abs().max() <= 0.1 * wide.abs().max()
