"""Runs of a model's own code beside its program: on copies, and with every generator of random numbers as it was."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from peftgraph.capture.diagnosis import exporter_silenced
from peftgraph.capture.example_inputs import Example
from peftgraph.capture.fake_model import ask_for_no_cache, compiling_flag_set, fake_arguments, fake_copy_of
from peftgraph.capture.submodule import frozen_copy

SEED = 20260101


@dataclass(frozen=True)
class EagerResult:
    """What a call gave: the leaves of its outputs, and the buffers of the module afterwards."""

    leaves: list[Any]
    buffers: dict[str, Tensor]


def run_eagerly(model: nn.Module, example: Example, training: bool) -> EagerResult:
    """Return the outputs of a copy of `model` on `example`; exceptions of the model's code are not caught."""
    copy = frozen_copy(model).train(training)
    ask_for_no_cache(copy)
    args, kwargs = example.call(_copies(dict(example.arguments)))
    with tracing_conditions(), seeded(model):
        output = example.result(copy(*args, **kwargs))
    buffers = {name: buffer.detach() for name, buffer in copy.named_buffers(remove_duplicate=False)}
    return EagerResult(pytree.tree_leaves(output), buffers)


def run_on_fake_tensors(model: nn.Module, example: Example, training: bool) -> EagerResult:
    """Run as `run_eagerly` does, on fake tensors: sizes and dtypes alone."""
    same = (torch.float32, torch.float32)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fake_model = fake_copy_of(model, mode, *same).train(training)
    args, kwargs = example.call(fake_arguments(dict(example.arguments), mode, *same))
    with torch.no_grad(), seeded(model), exporter_silenced(), mode, compiling_flag_set():
        output = example.result(fake_model(*args, **kwargs))
    return EagerResult(pytree.tree_leaves(output), {})


@contextmanager
def tracing_conditions() -> Iterator[None]:
    """Set the conditions of a traced call: gradients are enabled, and layers take no fast path of their own."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with exporter_silenced(), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Seed every generator alike, and restore the generators' states at the end."""
    with generators_restored(model):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would seed devices that are none of the model's
        for device in _devices(model):
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(SEED)
        random.seed(SEED)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(SEED)
        yield


@contextmanager
def generators_restored(model: nn.Module) -> Iterator[None]:
    """Restore the states of torch's, Python's and NumPy's generators at the end."""
    numpy, python = sys.modules.get("numpy"), random.getstate()
    arrays = None if numpy is None else numpy.random.get_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for device in _devices(model):
                stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


def _devices(model: nn.Module) -> set[torch.device]:
    """Return the model's devices that have random generators of their own."""
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return {device for device in found if device.type not in ("cpu", "meta")}


def _copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: pytree.tree_map_only(Tensor, torch.clone, value) for name, value in arguments.items()}
