"""Tracing one submodule of a model: the call it gets when the whole model runs, and the model around it."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.capture.example_inputs import Example, bind_example, with_distinct_batch
from peftgraph.capture.fake_model import give_own_caches
from peftgraph.errors import CallError, TraceError
from peftgraph.ir.signature import Signature


@dataclass(frozen=True)
class SubmoduleCall:
    """One call of a module: its arguments, and whether gradients were recorded."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: bool


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy under eval() whose parameters share storage with `model` and require no grad; buffers are
    copied, and so are tensors that are plain attributes of modules."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo |= {id(one): one.detach().clone() for one in vars(module).values() if isinstance(one, Tensor)}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    copied = copy.deepcopy(model, memo).eval()
    give_own_caches(copied, memo)
    return copied


def require_submodule(model: nn.Module, root: str) -> nn.Module:
    """Return the submodule `root` of `model`.

    Raises:
        TraceError: there is none; the nearest names are listed.
    """
    names = [name for name, _ in model.named_modules() if name]
    if root not in names:
        near = difflib.get_close_matches(root, names, 3, 0.3) or [name for name, _ in model.named_children()]
        raise TraceError(f"{type(model).__name__} has no submodule {root!r}. Nearest: {', '.join(near)}.")
    return model.get_submodule(root)


def record_submodule_calls(model: nn.Module, root: str, example: Example) -> list[SubmoduleCall]:
    """Return the calls that the submodule `root` of `model` gets when the model is run on `example`.

    Raises:
        TraceError: the model cannot be run on it, never calls the submodule, or calls it without gradients only.
    """
    found: list[SubmoduleCall] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(SubmoduleCall(args, kwargs, torch.is_grad_enabled()))

    part = model.get_submodule(root)
    handle = part.register_forward_pre_hook(record, with_kwargs=True)
    args, kwargs = example.call(dict(example.arguments))
    try:
        with torch.enable_grad():
            model(*args, **kwargs)
    except Exception as error:  # whatever a model's code raises on an example that it does not take
        raise TraceError(
            f"{type(model).__name__} cannot be run on the example, which shows how {root} is called "
            f"({type(error).__name__}: {error})."
        ) from error
    finally:
        handle.remove()
    if not found:
        raise TraceError(
            f"{type(model).__name__} never calls {root} on the example. Give an example that reaches it, or name "
            "the submodule that is called (a list of modules is not)."
        )
    if not any(call.gradients for call in found):
        raise TraceError(
            f"{type(model).__name__} calls {root} under torch.no_grad() only: nothing in it can be trained."
        )
    return found


def require_served(signature: Signature, root: str, calls: list[SubmoduleCall]) -> None:
    """Check that a program with that signature can serve every call.

    Raises:
        TraceError: it cannot; the message names the call.
    """
    for i, call in enumerate(calls):
        try:
            signature.bind(call.args, call.kwargs)
        except CallError as error:
            raise TraceError(
                f"{root} is called {len(calls)} times on the example, and the program that was traced from the first "
                f"call does not take call {i + 1}: {error}"
            ) from error


def observe_calls(model: nn.Module, root: str, example: Any) -> tuple[nn.Module, Example, list[SubmoduleCall]]:
    """Return a frozen copy of `model`, the example bound to its signature, and the calls that `root` gets from it."""
    require_submodule(model, root)
    around = frozen_copy(model)
    bound = with_distinct_batch(bind_example(around, example))
    return around, bound, record_submodule_calls(around, root, bound)
