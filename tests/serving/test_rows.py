"""Rows of one batch with adapters of their own are what each adapter computes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import laws
import pytest
import torch
import zoo
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertForSequenceClassification

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, DoRA, LoRA, Pfeiffer, Prefix, Prompt, PTuning, Train

F64 = torch.float64
NAMES = ("llama", "gpt2", "bert", "t5", "vit", "mixtral")
# Rows behind the finished embeddings change the sizes of the model's own values.
ALONE = ("prompt_behind", "prompt_pictures")


def trained(program: pg.Program, seed: int) -> pg.Program:
    """A program with parameters as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in program.table.trainable.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=F64).to(value.dtype))
    return program


def leaves(output: Any, rows: int) -> list[Tensor]:
    """The outputs that have a row for each example."""
    found = [one for one in pytree.tree_leaves(output) if isinstance(one, Tensor)]
    return [one for one in found if one.dim() and one.shape[0] == rows]


def outputs(program: pg.Program, inputs: Mapping[str, Tensor], rows: int) -> list[Tensor]:
    return leaves(program.module().eval()(**inputs), rows)


def check_rows(net: Any, inputs: Mapping[str, Tensor], ids: Any, alone: Sequence[pg.Program], bound: float) -> None:
    """Check each row of a call with the program that its adapter is."""
    found = leaves(net(**inputs, adapter_ids=ids), len(alone))
    for row, program in enumerate(alone):
        for mine, own in zip(found, outputs(program, inputs, len(alone)), strict=True):
            assert (mine[row] - own[row]).abs().max() <= bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", [key for key in laws.LINES if key not in ALONE])
def test_every_method(name: str, key: str) -> None:
    line = laws.LINES[key]
    if line.refusal(name) or (line.only and name not in line.only):
        pytest.skip("it has no meaning there")
    base = laws.base_of(name).program
    first, second = (trained(base.apply(*line.passes), seed) for seed in (1, 2))
    other = trained(base.apply(LoRA(rank=3)), 3)
    net = base.serve({"first": first, "second": second, "other": other}).module().eval()
    torch.manual_seed(3)
    inputs = zoo.example(name, 4, 7, F64)
    check_rows(net, inputs, ["second", None, "first", "other"], [second, base, first, other], 1e-9)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_prompts_of_different_lengths(name: str) -> None:
    """Examples with fewer rows, or none, keep the positions that they have alone, in padded batches too."""
    base = laws.base_of(name).program
    short, mixed = base.apply(Prompt(length=2)), base.apply(Prompt(length=5), LoRA(rank=2))
    tuned = [short, mixed, base.apply(PTuning(length=3, hidden=4)), base.apply(LoRA(rank=3), IA3())]
    tuned = [trained(one, i) for i, one in enumerate(tuned)]
    net: Any = base.serve({str(i): one for i, one in enumerate(tuned)}, slots=5).module().eval()
    torch.manual_seed(3)
    inputs = zoo.example(name, 5, 7, F64)
    inputs["attention_mask"][1, :3] = 0
    inputs["attention_mask"][2, -2:] = 0
    kept = inputs["attention_mask"].bool()
    alone = [tuned[1], tuned[0], base, tuned[2], tuned[3]]
    found = leaves(net(**inputs, adapter_ids=["1", "0", None, "2", "3"]), 5)
    for row, program in enumerate(alone):
        for mine, own in zip(found, outputs(program, inputs, 5), strict=True):
            tokens = kept[row] if mine.dim() == 3 and mine.shape[1] == 7 else slice(None)
            assert (mine[row][tokens] - own[row][tokens]).abs().max() <= 1e-9
    longer = trained(base.apply(Prompt(length=4)), 8)
    net.swap("0", longer)
    mine, own = (leaves(one, 5)[0][0] for one in (net(**inputs, adapter_ids="0"), longer.module().eval()(**inputs)))
    assert (mine - own).abs().max() <= 1e-9
    with pytest.raises(pg.PeftGraphError, match="fits no graph of this module"):
        net.swap("0", base.apply(Prompt(length=6)))


def test_rows_of_no_adapter_are_the_base_to_the_bit() -> None:
    base = laws.base_of("llama").program
    low = [trained(base.apply(LoRA(at="linear", rank=rank, alpha=3.0)), rank) for rank in (2, 4)]
    mixed = [*low, trained(base.apply(IA3()), 5), trained(base.apply(Pfeiffer(width=3)), 6)]
    served = base.serve({str(i): one for i, one in enumerate(mixed)})
    inputs = zoo.example("llama", 3, 5, F64)
    for ids in (["0", 0, 0], None):
        found = leaves(served.module().eval()(**inputs, **({} if ids is None else {"adapter_ids": ids})), 3)
        for mine, own in zip(found, outputs(base, inputs, 3), strict=True):
            assert torch.equal(mine[1:], own[1:])
    assert not any("where" in line for line in served.text().splitlines() if "adapters" in line)


def test_several_train_in_one_batch() -> None:
    """Each adapter gets the gradients of its own rows alone, and all of them are the parameters of its program."""
    base = laws.base_of("llama").program
    recipes: dict[str, tuple[Any, ...]] = {
        "small": (LoRA(rank=2),),
        "large": (LoRA(rank=4, alpha=3.0),),
        "scales": (IA3(),),
        "rows": (Prefix(length=3, hidden=4),),
        "norms": (LoRA(at="linear", rank=2), BitFit(at="norm", zero=True, norms=True)),
        "decomposed": (DoRA(rank=2),),
        "serial": (Pfeiffer(width=3),),
    }
    programs = {name: trained(base.apply(*passes), i) for i, (name, passes) in enumerate(recipes.items())}
    net: Any = base.serve(programs, trainable=True).module().eval()
    groups = {group["name"]: group for group in net.optimiser_groups(small={"lr": 0.5})}
    assert groups["small"]["lr"] == 0.5
    assert [group["name"] for group in net.optimiser_groups()] == list(recipes)
    rows = [*recipes, "small", "rows", None]
    torch.manual_seed(3)
    inputs = zoo.example("llama", len(rows), 6, F64)
    logits = net(**inputs, adapter_ids=rows).logits
    weights = torch.randn(logits.shape, dtype=F64)
    (logits * weights).sum().backward()
    together = {name: [p.grad.clone() for p in group["params"]] for name, group in groups.items()}
    for name, program in programs.items():
        own = program.table.trainable.values()
        assert {id(one) for one in own} == {id(one) for one in groups[name]["params"]}
        for one in own:
            one.grad = None
        mine = [i for i, row in enumerate(rows) if row == name]
        alone = program.module().eval()(**{key: value[mine] for key, value in inputs.items()}).logits
        (alone * weights[mine]).sum().backward()
        for p, grad in zip(groups[name]["params"], together[name], strict=True):
            assert (p.grad - grad).abs().max() <= 1e-10


def test_a_named_program_serves_its_own_adapters() -> None:
    base = laws.base_of("bert").program
    tuned = trained(base.apply(LoRA(rank=2, name="dog"), IA3(name="cat"), LoRA(rank=3, name="cat")), 4)
    net = tuned.serve().module().eval()
    inputs = zoo.example("bert", 3, 6, F64)
    check_rows(net, inputs, ["cat", "dog", 0], [tuned.only("cat"), tuned.only("dog"), base], 1e-10)
    with pytest.raises(pg.PeftGraphError, match="serves the named passes"):
        base.apply(LoRA(rank=2)).serve()


def test_what_cannot_be_served() -> None:
    base, other = laws.base_of("llama").program, laws.base_of("gpt2").program
    low = base.apply(LoRA(rank=2))
    served = base.serve({"a": low})
    for call in (
        lambda: served.apply(LoRA(rank=2)),
        lambda: pg.fold(served),
        lambda: served.save_adapter("x"),
        served.finalize,
    ):
        with pytest.raises(pg.PeftGraphError, match="a program that serves 1 adapters"):
            call()
    with pytest.raises(pg.PeftGraphError, match="another base"):
        base.serve({"a": low, "b": other.apply(LoRA(rank=2))})
    with pytest.raises(pg.PeftGraphError, match="has no passes"):
        base.serve({"a": base})
    with pytest.raises(pg.PeftGraphError, match="at least one adapter"):
        base.serve({})
    with pytest.raises(pg.PeftGraphError, match="without trained passes"):
        low.serve({"a": low})
    with pytest.raises(pg.PeftGraphError, match="slots must be at least 1"):
        base.serve({"a": low}, slots=0)


def test_a_part_of_a_model_and_trained_heads() -> None:
    """Heads, tables and norms of their own, beside an adapter at every weight, in half precision too."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3)
    model = BertForSequenceClassification(config).eval().bfloat16()
    inputs = {"input_ids": torch.randint(40, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    base = pg.trace(model, inputs)
    tuned = [
        base.apply(LoRA(rank=2), Train(at="head")),
        base.apply(Train(at="head|embedding|norm")),
        base.apply(LoRA(at="weight", rank=2)),
    ]
    tuned = [trained(one, i) for i, one in enumerate(tuned)]
    net = base.serve({str(i): one for i, one in enumerate(tuned)}).module().eval()
    check_rows(net, inputs, ["0", "1", "2", None], [*tuned, base], 0.05)
    part = pg.trace(model, inputs, root="bert")
    with pytest.raises(pg.Conflict, match="a part of a model"):
        part.serve({"a": part.apply(LoRA(rank=2))})


def test_convolutions_by_row() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Flatten()
    ).double()
    base = pg.trace(model.eval(), {"input": torch.randn(3, 3, 8, 8, dtype=F64)})
    tuned = [trained(base.apply(one), i) for i, one in enumerate((LoRA(at="weight", rank=2), Train(at="conv")))]
    net = base.serve({"low": tuned[0], "all": tuned[1]}).module().eval()
    check_rows(net, {"input": torch.randn(3, 3, 8, 8, dtype=F64)}, ["all", "low", 0], [tuned[1], tuned[0], base], 1e-9)
