"""What a model does in one mode only follows train() and eval(), to the bit and under the same seed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftgraph as pg
from peftgraph.ir.modes import evaluation_graph, training_graph
from peftgraph.passes.lora import LoRA

X = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))


def paths_divided(x: Tensor, rate: float) -> Tensor:
    keep = 1 - rate
    mask = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    mask.floor_()
    return x.div(keep) * mask


def paths_multiplied(x: Tensor, rate: float) -> Tensor:
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate)
    mask.div_(1 - rate)
    return x * mask


class Model(nn.Module):
    """A residual branch, with something between it and the addition that depends on the mode."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.between(self.b(F.dropout(self.a(x).relu(), 0.1, self.training)))

    def between(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Divided(Model):
    def between(self, y: Tensor) -> Tensor:
        return paths_divided(y, 0.4) if self.training else y


class Multiplied(Model):
    def between(self, y: Tensor) -> Tensor:
        return F.dropout(paths_multiplied(y, 0.4), 0.2) if self.training else y


class Noise(Model):
    def between(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y) if self.training else y


class Evaluates(Model):
    def between(self, y: Tensor) -> Tensor:
        return y if self.training else torch.tanh(self.a(y)) @ self.b.weight.t() + torch.tensor([0.5])


class Scales(Model):
    """The same operations, another literal."""

    def between(self, y: Tensor) -> Tensor:
        return y * (0.5 if self.training else 1.5)


class Averages(Model):
    """A running mean that training moves and evaluation reads."""

    def between(self, y: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)
        return y - self.mean


class Twice(Model):
    """The choice depends on a choice."""

    def between(self, y: Tensor) -> Tensor:
        y = paths_divided(y, 0.4) if self.training else y
        return paths_multiplied(self.b(self.a(y)), 0.4) if self.training else self.b(self.a(y)).abs()


MODELS = [Divided, Multiplied, Noise, Evaluates, Scales, Averages, Twice]


def in_both_modes(model: nn.Module, net: nn.Module, x: Tensor) -> bool:
    model.requires_grad_(False)
    for training in (True, False, True):
        outputs = []
        for module in (model.train(training), net.train(training)):
            torch.manual_seed(3)
            outputs.append(module(x))
        if not torch.equal(*outputs):
            return False
    return True


@pytest.mark.parametrize("cls", MODELS)
def test_both_modes_are_eager(cls: Any) -> None:
    model = cls()
    program = pg.trace(copy.deepcopy(model), X)
    assert "by_mode(" in program.text()
    for x in (X, X[:1, :3]):
        assert in_both_modes(copy.deepcopy(model), program.module(), x)
    double = copy.deepcopy(model).double()
    assert in_both_modes(double, program.module().double(), X.double())


@pytest.mark.parametrize("cls", MODELS)
def test_neither_mode_runs_what_is_the_others(cls: Any) -> None:
    program = pg.trace(cls(), X)
    operators = {
        face: {str(node.target) for node in face(program.graph).nodes if node.op == "call_function"}
        for face in (training_graph, evaluation_graph)
    }
    assert not any("by_mode" in name for names in operators.values() for name in names)
    random = ("rand", "bernoulli", "dropout")
    assert not any(word in name for name in operators[evaluation_graph] for word in random)
    assert not any("tanh" in name or "abs" in name for name in operators[training_graph])


@pytest.mark.parametrize("cls", [Divided, Multiplied, Noise, Scales, Averages])  # the others use a weight twice
def test_passes_and_folds(cls: Any) -> None:
    torch.manual_seed(4)
    model = cls()
    program = pg.trace(model, X)
    tuned = program.apply(LoRA(at=pg.ffn.down, rank=2))
    assert in_both_modes(copy.deepcopy(model), tuned.module(), X)  # a fresh adapter changes nothing
    with torch.no_grad():
        for parameter in tuned.table.trainable.values():
            parameter.normal_()
    assert pg.fold(tuned).text() == program.text()
    merged = pg.fold(tuned).write_back(copy.deepcopy(model).eval())
    torch.testing.assert_close(tuned.module().eval()(X), merged(X), rtol=1e-5, atol=1e-5)


def test_a_model_without_modes_has_no_choice() -> None:
    class Plain(Model):
        def between(self, y: Tensor) -> Tensor:
            return F.dropout(y, 0.3, self.training)

    assert "by_mode" not in pg.trace(Plain(), X).text()


def of_a_library(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model, an example, and how it is called."""
    from transformers import PhimoeConfig, PhimoeForCausalLM, SwinConfig, SwinModel, XLNetConfig, XLNetModel

    ids = {"input_ids": torch.randint(0, 61, (3, 7))}
    if name == "swin":
        pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
        return SwinModel(SwinConfig(embed_dim=12, depths=[2], num_heads=[2], image_size=32, window_size=4)), pixels, {}
    if name == "xlnet":
        return XLNetModel(XLNetConfig(vocab_size=61, d_model=48, n_layer=2, n_head=6, d_inner=80)), ids, NO_MEMORY
    moe: dict[str, Any] = {"intermediate_size": 80, "num_hidden_layers": 2, "num_local_experts": 4}
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return PhimoeForCausalLM(PhimoeConfig(vocab_size=61, hidden_size=48, **moe, **heads)), ids, {}


NO_MEMORY = {"use_mems": False}


@pytest.mark.parametrize("name", ["swin", "phimoe", "xlnet"])
def test_models_of_a_library(name: str) -> None:
    model, example, more = of_a_library(name)
    net = pg.trace(model, example).module()
    model.requires_grad_(False)
    for training in (True, False):
        outputs = []
        for module in (model.train(training), net.train(training)):
            torch.manual_seed(3)
            outputs.append(module(**example, **more)[0])
        assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers_follows_the_mode(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    cell = kind(6, 5, num_layers=2, dropout=0.5, batch_first=True).requires_grad_(False)
    x = torch.randn(3, 7, 6)
    program = pg.trace(cell, (x,))
    assert "by_mode" not in program.text()
    net = program.module()
    for training in (True, False):
        net.train(training)
        cell.train(training)
        torch.manual_seed(1)
        ours = net(x)[0]
        torch.manual_seed(1)
        torch.testing.assert_close(ours, cell(x)[0], rtol=0, atol=0)


class Dropping(nn.Module):
    """Training keeps half of the tokens, and heads are cut out of what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = x[:, torch.randperm(x.shape[1])[: max(1, int(x.shape[1] * 0.5))]]
        heads = self.b(x).view(x.shape[0], x.shape[1], 2, 3)
        return heads.transpose(1, 2).flatten(2)[:, :, :3]


def test_sizes_that_a_mode_has_for_itself_are_refused() -> None:
    with pytest.raises(pg.TraceError, match="Dropping computes with other sizes in training than in evaluation"):
        pg.trace(Dropping().eval(), torch.randn(2, 8, 6))
