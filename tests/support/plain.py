"""Adapters and a block of `zoo.Nano` in plain PyTorch, with every place where an adapter may stand. For tests only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import zoo
from torch import Tensor, nn

D = zoo.WIDTH
ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}


class Bottleneck(nn.Module):
    """W_up drop(act(W_down h + b_down)) + b_up."""

    def __init__(self, width: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, width).double(), nn.Linear(width, D).double()
        self.act, self.drop = ACTIVATIONS[activation], nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.drop(self.act(self.down(h))))


def pairs(adapters: Mapping[str, Bottleneck]) -> dict[str, Tensor]:
    """The parameters of bottlenecks by our names, from the paths they stand under."""
    sides = [
        (f"{name}.{side}", getattr(adapter, side)) for name, adapter in adapters.items() for side in ("down", "up")
    ]
    return {f"{name}_{part}": getattr(linear, part) for name, linear in sides for part in ("weight", "bias")}


def norms(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of all layer norms, which then train."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    named = {f"{name}.{part}": getattr(module, part) for name, module in found for part in ("weight", "bias")}
    for parameter in named.values():
        parameter.requires_grad_(True)
    return named


Change = Callable[..., Tensor]


def rewrite(block: nn.Module, **changes: Change) -> None:
    """Gives a `zoo.NanoBlock` a forward with changes at its places.

    Changes are called as change(site, value, read, stream): `site` is "attention" or "ffn", `read` what the sublayer
    reads and `stream` the residual stream. Places: `heads`, `undropped`, `branch` and `total`, the residual sum.
    """

    def at(place: str, site: str, value: Tensor, read: Tensor, stream: Tensor) -> Tensor:
        return changes[place](site, value, read, stream) if place in changes else value

    def forward(x: Tensor) -> Tensor:
        for site, norm in (("attention", block.n1), ("ffn", block.n2)):
            read, stream = norm(x), x
            if site == "attention":
                h = block.out(at("heads", site, _heads(block, read), read, stream))
            else:
                h = block.proj(nn.functional.gelu(block.fc(read)))
            h = block.drop(at("undropped", site, h, read, stream))
            x = at("total", site, stream + at("branch", site, h, read, stream), read, stream)
        return x

    block.forward = forward


def _heads(block: nn.Module, read: Tensor) -> Tensor:
    b, s, d = read.shape
    q, k, v = (t.view(b, s, block.heads, -1).transpose(1, 2) for t in block.mix(read).split(d, dim=2))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(b, s, d)


def std_of(parameters: Mapping[str, Tensor], end: str) -> tuple[float, float]:
    """The standard deviation and the largest magnitude of all values of the parameters whose names end so."""
    values = torch.cat([value.detach().flatten() for name, value in parameters.items() if name.endswith(end)])
    return float(values.std()), float(values.abs().max())
