"""Optimised blocks train as the plain graph does, keep fewer bytes, and join products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from alive import kept_bytes
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.optimise.joint_graph import run_graph
from peftgraph.passes import IA3, DoRA, LoRA, ParallelAdapter, Prefix, UniPELT
from peftgraph.runtime.training_report import RegionCost

METHODS: dict[str, list[Any]] = {
    "lora": [LoRA(at="attention.*|ffn.*", rank=2, dropout=0.1)],
    "exact": [LoRA(at="attention.*|ffn.*", rank=2)],
    "dora": [DoRA(rank=2)],
    "ia3": [IA3()],
    "prefix": [Prefix(length=2, hidden=None)],
    "parallel": [ParallelAdapter()],
    "unipelt": [UniPELT()],
}
CASES = [(name, "lora") for name in zoo.NAMES] + [
    ("nano", method) for method in METHODS if method not in ("lora", "exact")
]


def loss(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    output: Any = net(**inputs)
    first: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return first.square().mean()


def gradients(net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    net.zero_grad()
    loss(net, inputs).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for name, grad in theirs.items():
        assert float((ours[name] - grad).abs().max()) <= bound * float(grad.abs().max()), name


def tokens(*sizes: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 60, sizes), "attention_mask": torch.ones(sizes, dtype=torch.int64)}


def tuned(name: str, method: str = "lora") -> pg.Program:
    torch.manual_seed(0)
    return zoo.randomise(zoo.traced(name).apply(*METHODS[method]))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_gradients_are_those_of_the_plain_graph(name: str, method: str) -> None:
    program, inputs = tuned(name, method), zoo.example(name)
    net, plain = program.module("train").train(), program.module("off").train()
    assert torch.allclose(loss(net, inputs), loss(plain, inputs), rtol=1e-5)
    assert_close(gradients(net, inputs), gradients(plain, inputs), 1e-4)
    report = program.explain_cost(net)
    assert report.costs
    assert not report.refusals, str(report)
    assert all(cost.repeated == 0 for cost in report.costs)


@pytest.fixture(scope="module")
def llama() -> tuple[pg.Program, nn.Module, nn.Module]:
    program = tuned("llama", "exact")
    return program, program.module("train").train(), program.module("off").train()


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (4, 1), (3, 17)])
def test_one_trace_serves_all_sizes(llama: tuple[pg.Program, nn.Module, nn.Module], sizes: tuple[int, int]) -> None:
    _, net, plain = llama
    inputs = tokens(*sizes)
    assert_close(gradients(net, inputs), gradients(plain, inputs), 1e-4)


def test_products_of_siblings_are_joined_and_bytes_halved(llama: tuple[pg.Program, nn.Module, nn.Module]) -> None:
    program, net, plain = llama
    inputs = tokens(4, 16)
    loss(net, inputs)
    costs = program.explain_cost(net).costs
    assert all(after < before for before, after in (cost.products for cost in costs))
    assert kept_bytes(lambda: loss(net, inputs)) < 0.6 * kept_bytes(lambda: loss(plain, inputs))
    assert "model.layers.0" in str(program.explain_cost(net))


def test_a_budget_is_kept_and_everything_can_be_computed_again() -> None:
    program, inputs = tuned("llama", "exact"), zoo.example("llama")
    wanted = gradients(program.module("off").train(), inputs)
    kept: list[RegionCost] = []
    for budget in (1.0, 0.5, 0.0):
        net = program.module("train", activation_budget=budget).train()
        assert_close(gradients(net, inputs), wanted, 1e-4)
        kept.append(program.explain_cost(net).costs[0])
    full, half, none = (cost.kept_bytes for cost in kept)
    assert half <= 0.55 * full
    assert none < 0.2 * full  # the state of a generator, for the dropout of attention
    assert kept[0].repeated == 0 < kept[1].repeated < kept[2].repeated


def test_checkpointed_blocks_keep_their_inputs_alone() -> None:
    program, inputs = tuned("llama"), zoo.example("llama")
    net: Any = program.module("train").train()
    wanted = gradients(net, inputs)
    net.gradient_checkpointing_enable()
    assert_close(gradients(net, inputs), wanted, 0.0)  # the same operations, and the same dropout
    once, again = (
        [cost for cost in program.explain_cost(net).costs if bool(cost.repeated) == how] for how in (False, True)
    )
    assert max(cost.kept_bytes for cost in again) < 0.6 * min(cost.kept_bytes for cost in once)  # generators' states


def test_other_dtypes_and_autocast() -> None:
    program, inputs = tuned("llama"), zoo.example("llama")
    net, plain = program.module("train").train(), program.module("off").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = gradients(net, inputs), gradients(plain, inputs)
    assert_close(ours, theirs, 0.1)
    net, plain = net.double(), plain.double()
    assert_close(gradients(net, inputs), gradients(plain, inputs), 1e-12)


def test_small_blocks_run_the_plain_code_by_default() -> None:
    program, inputs = tuned("llama"), zoo.example("llama")
    net, plain = program.module().train(), program.module("off").train()
    assert_close(gradients(net, inputs), gradients(plain, inputs), 0.0)
    assert not program.explain_cost(net).costs


def test_a_part_that_cannot_be_traced_says_so() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * float(x.detach().abs().max())

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0]

    program, inputs = tuned("llama"), zoo.example("llama")
    wanted = gradients(program.module("off").train(), inputs)
    net: Any = program.module("train").train()
    net._peftgraph.prepare(net, net._peftgraph.missing(net._peftgraph.signature.bind((), inputs)))
    for region in net._peftgraph.regions.values():
        silu = next(node for node in region.graph.nodes if str(node.target) == "aten.silu.default")
        silu.target = Square.apply
    assert_close(gradients(net, inputs), wanted, 0.0)
    report = program.explain_cost(net)
    assert not report.costs
    assert report.refusals
    assert all(reason.startswith("not traced") for _, reason in report.refusals)


def test_arguments_are_checked() -> None:
    with pytest.raises(pg.PeftGraphError, match="optimise is one of"):
        zoo.traced("llama").module("fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(pg.PeftGraphError, match="between 0 and 1"):
        zoo.traced("llama").module("train", activation_budget=2.0)


def test_a_view_that_is_read_after_a_write_is_not_traced() -> None:
    """What a view shows after its memory was overwritten, no functional operation computes."""

    class Overwrites(nn.Module):
        def __init__(self, late: bool) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
            self.late = late

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                y = block(x) * 2
                part = y[:, :3]
                early = part.sum()
                y = y.mul_(0.5)
                x = x + y + (part.sum() if self.late else early)
            return x

    torch.manual_seed(0)
    x = torch.randn(4, 6)
    for late in (False, True):
        graph = torch.export.export(Overwrites(late), (x,)).graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        values = [torch.randn(*node.meta["val"].shape) for node in inputs]
        refused = late and any("mul_" in str(node.target) for node in graph.nodes)
        if refused:
            with pytest.raises(NotImplementedError, match="read again"):
                run_graph(graph, inputs, values)
        else:
            run_graph(graph, inputs, values)
    assert refused
