"""Compares the code of a training region with the plain code, on one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peftgraph.optimise.seeded_dropout import from_state, generator_state
from peftgraph.optimise.training_graphs import TrainingGraphs
from peftgraph.runtime.codegen import Code

MARGIN = 64  # epsilons times the square root of the number of operations, as between a fold's outputs
MOST = 0.25  # of the largest value, in half precision


@dataclass(frozen=True)
class RegionCheck:
    """What a comparison found.

    Attributes:
        difference: where outputs or gradients differ by more than rounding; None if they do not.
        plain_bytes: what the plain code keeps for its backward pass, besides inputs.
        kept_bytes: what the region keeps.
    """

    difference: str | None
    plain_bytes: int
    kept_bytes: int


def compare_with_plain(
    plain: Code, stored: Sequence[str], run: Callable[..., Any], operands: Sequence[Any], graphs: TrainingGraphs
) -> RegionCheck:
    """Run both codes on one call and compare outputs, gradients and kept bytes.

    Args:
        plain: reads the stored tensors of a module.
        stored: their names; they are the first operands.
        run: the other code, which takes all operands.
        operands: of the call; the random generator is left as it is.
        graphs: says which outputs and inputs have gradients.
    """
    device = next(one.device for one in operands if isinstance(one, Tensor))
    state, found, kept = generator_state(device), list[list[Any]](), list[int]()
    for code in (lambda *leaves: plain(_holder(stored, leaves), *leaves[len(stored) :]), run):
        leaves = [leaf(one) for one in operands]
        with torch.enable_grad(), from_state(device, state):
            outputs, size = _measured(code, leaves)
            chosen = [outputs[i] for i in graphs.differentiable]
            seeds = [one.detach().to(torch.float32).sin().to(one.dtype) for one in chosen]
            grads = torch.autograd.grad(chosen, [leaves[i] for i in graphs.wanted], seeds, allow_unused=True)
        found.append([*outputs, *grads])
        kept.append(size)
    names = [f"output {i}" for i in range(graphs.outputs)] + [f"the gradient by input {i}" for i in graphs.wanted]
    count = len(list(graphs.backward.nodes))
    wrong = [name for name, a, b in zip(names, *found, strict=True) if not agree(a, b, count)]
    difference = f"{wrong[0]} is not that of the plain code" if wrong else None
    return RegionCheck(difference, *kept)


def leaf(value: Any) -> Any:
    """Return a tensor as a leaf of its own, with its values; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _holder(stored: Sequence[str], tensors: Sequence[Any]) -> nn.Module:
    """Return an object that has tensors under the names of stored ones."""
    holder: Any = nn.Module()
    for path, tensor in zip(stored, tensors, strict=False):
        *parents, name = path.split(".")
        place = holder
        for parent in parents:
            place = place.__dict__.setdefault(parent, nn.Module())
        place.__dict__[name] = tensor
    return holder


def _measured(code: Callable[..., Any], leaves: Sequence[Any]) -> tuple[list[Any], int]:
    """Run code, and return its outputs and the bytes of the memory that it keeps, besides that of its inputs."""
    given = {one.untyped_storage().data_ptr() for one in leaves if isinstance(one, Tensor)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = list(code(*leaves))
    return outputs, sum(one.untyped_storage().nbytes() for one in kept.values())


def agree(plain: Any, ours: Any, operations: int, most: float = MOST) -> bool:
    """Return True if two values are equal up to rounding, which differs by `most` of the largest value at most."""
    if not isinstance(plain, Tensor) or not isinstance(ours, Tensor):
        return type(plain) is type(ours) and plain == ours
    if plain.shape != ours.shape or plain.dtype != ours.dtype:
        return False
    a, b = plain.detach(), ours.detach()
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = (torch.where(finite, one, 0).double() for one in (a, b))
    bound = min(most, MARGIN * torch.finfo(plain.dtype).eps * math.sqrt(operations))
    return not a.numel() or float((a - b).abs().max()) <= bound * float(a.abs().max())
