"""Custom autograd functions stay whole: gradients are their authors', to the bit, wherever a program goes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.capture.autograd_functions import AutogradFunctionTarget
from peftgraph.ir.verifier import verify
from peftgraph.passes.lora import LoRA

X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


class Sign(torch.autograd.Function):
    """A straight-through estimator: the derivative of sign is 0, its backward passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Split(torch.autograd.Function):
    """Two values, one of them without gradient, and a None; scaled by a number and cut at a size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: dict[str, Any], size: int, dtype: torch.dtype, weights: Any) -> Any:
        ctx.scale = options["scale"]
        index = x.argmax(-1)
        ctx.mark_non_differentiable(index)
        return x * ctx.scale * size, None, (x * ctx.scale).to(dtype), index

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 10 * (grads[0] + 3 * grads[2]), None, None, None, None


class Reverse(torch.autograd.Function):
    """The identity, with the gradient turned round; written with `setup_context`."""

    @staticmethod
    def forward(x: Tensor, by: float = 1.0) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.by = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -ctx.by * grads[0], None


reverse = Reverse.apply  # bound before anything is traced


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = Sign.apply(self.a(x))
        first, _, second, index = Split.apply(y, {"scale": 0.5}, y.shape[1], y.dtype, [2.0, (x,)])
        return self.b(reverse(first + second, by=2.0)) + index[..., None]


def gradients(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    module.zero_grad()
    torch.manual_seed(5)
    out = module(*args, **kwargs)
    out = out if isinstance(out, Tensor) else out[0]
    out.square().sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in module.named_parameters()}


def agree(model: nn.Module, net: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs and the gradients of all parameters are equal to the bit."""
    (theirs, wanted), (mine, have) = (gradients(m, *args, **kwargs) for m in (model, net))
    assert torch.equal(mine, theirs)
    assert {name for name, grad in have.items() if grad is not None} == {
        name for name, grad in wanted.items() if grad is not None
    }
    assert all(torch.equal(grad, wanted[name]) for name, grad in have.items() if grad is not None)  # pyright: ignore


def kept(program: pg.Program) -> list[str]:
    return [
        node.target.function.__name__ for node in program.graph.nodes if isinstance(node.target, AutogradFunctionTarget)
    ]


def test_outputs_and_gradients_are_the_authors() -> None:
    model = Model()
    program = pg.trace(model, X)
    assert kept(program) == ["Sign", "Split", "Reverse"]
    assert "Split(%Sign, {'scale': 0.5}, %sym_size, f32, [2.0, [%x]])" in program.text()
    net = program.module().requires_grad_(True)
    agree(model, net, X)
    agree(model, net, X[:1, :4])
    agree(model, copy.deepcopy(net), X)
    grad = model.a.weight.grad
    assert grad is not None
    assert bool(grad.any())  # the derivative of the forward would be zero everywhere


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_moved_to_another_dtype(dtype: torch.dtype) -> None:
    net = pg.trace(Model(), X).module().requires_grad_(True).to(dtype)
    model = Model().to(dtype)
    model.load_state_dict(net.state_dict())
    agree(model, net, X.to(dtype))


def test_passes_fold_and_prove_around_them() -> None:
    model = Model()
    program = pg.trace(model, X)
    tuned = program.apply(LoRA(at=pg.projection | pg.head, rank=2))
    verify(tuned)
    net = tuned.module()
    before = net(X)
    with torch.no_grad():
        for parameter in tuned.table.trainable.values():
            parameter.normal_()
    net(X).sum().backward()
    assert all(parameter.grad is not None for parameter in tuned.table.trainable.values())
    assert not torch.equal(net(X), before)
    folded = pg.fold(tuned)
    assert folded.text() == program.text()
    torch.testing.assert_close(tuned.module()(X), folded.write_back(Model())(X), rtol=1e-5, atol=1e-6)


def test_export_goes_through_their_forward(tmp_path: Path) -> None:
    program = pg.trace(Model(), X)
    exported = torch.export.load(program.export(tmp_path / "model.pt2"))
    assert torch.equal(exported.module()(x=X)["output"], program.module()(X))
    assert not [node for node in exported.graph.nodes if "peftgraph" in str(node.target)]


def test_what_runs_after_tracing_is_torch_itself() -> None:
    pg.trace(Model(), X)
    assert "__getattribute__" not in vars(type(Sign))
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)
    y = torch.ones(2, requires_grad=True)
    torch.Tensor.sum(Sign.apply(y)).backward()
    assert torch.equal(y.grad, torch.ones(2))  # pyright: ignore[reportArgumentType]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return [x * 2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


@pytest.mark.parametrize(
    ("function", "extra", "why"),
    [
        (Opaque, (nn.Identity(),), "Opaque a Identity, which a graph cannot hold"),
        (Dirty, (), "Dirty writes into its input"),
        (Nested, (), "Nested returns a list"),
    ],
    ids=["argument", "in-place", "result"],
)
def test_what_cannot_be_kept(function: Any, extra: tuple[Any, ...], why: str) -> None:
    class Uses(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return function.apply(super().forward(input), *extra)

    with pytest.raises(pg.TraceError, match=rf"test_functions.{why}.*Write it in plain operations"):
        pg.trace(Uses(6, 5), X)


def test_models_of_a_library() -> None:
    from transformers import BloomConfig, BloomForCausalLM, PhimoeConfig, PhimoeForCausalLM, YosoConfig, YosoModel

    shared: dict[str, Any] = {"vocab_size": 61, "hidden_size": 48}
    eager = {"attn_implementation": "eager"}  # sdpa's kernel, and so the rounding, depends on whether it is exported
    moe: dict[str, Any] = {"intermediate_size": 80, "num_hidden_layers": 2, "num_local_experts": 4}
    models = {
        "GeLUFunction": BloomForCausalLM(BloomConfig(**shared, n_layer=2, n_head=6, hidden_dropout=0.1)),
        "PhimoeMultiplier": PhimoeForCausalLM(
            PhimoeConfig(**shared, **moe, **eager, num_attention_heads=6, num_key_value_heads=2, bos_token_id=1)
        ),
        "YosoCumulation": YosoModel(
            YosoConfig(**shared, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80)
        ),
    }
    inputs = {"input_ids": torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(2))}
    for name, model in models.items():
        program = pg.trace(model, inputs)
        assert set(kept(program)) == {name}
        net = program.module().requires_grad_(True)
        agree(model.train(), net.train(), **inputs)
    bloom = pg.trace(models["GeLUFunction"], inputs)
    assert len(bloom.sites.select("ffn.up")) == 2
