"""What a model does in training and not in evaluation.

One graph serves both modes: dropout and the statistics of batch norm follow train() and eval(). Anything else
that a model does in one mode only (stochastic depth, noise, dropped layers) would be lost, or stay on in
evaluation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from peftgraph.errors import TraceError
from peftgraph.trace.diagnose import describe_place, quiet
from peftgraph.trace.example import Example
from peftgraph.trace.ghost import ghost_arguments, ghost_of

TORCH = str(Path(torch.__file__).parent)
FOLLOWED = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
}

Step = tuple[str, str, int]  # the operation, and the file and line that calls it


def only_dropout_follows_the_mode(model: nn.Module, example: Example) -> None:
    """Compares the operations of a call under train() and under eval(), on fake tensors.

    Raises:
        TraceError: they differ by more than dropout; the message names the line.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    ghost = ghost_of(model, mode, torch.float32, torch.float32)
    try:
        with quiet():
            training = _steps(ghost.train(), example, mode)
            evaluation = _steps(ghost.eval(), example, mode)
    except Exception:  # what cannot run on fake tensors is explained by the export that follows
        return
    if [step[0] for step in training] == [step[0] for step in evaluation]:
        return
    where = next(
        (i for i, (a, b) in enumerate(zip(training, evaluation, strict=False)) if a[0] != b[0]),
        min(len(training), len(evaluation)),
    )
    longer = training if len(training) >= len(evaluation) else evaluation
    what, file, line = longer[where]
    raise TraceError(
        f"{type(model).__name__} cannot be traced.\n{describe_place(file, line)}"
        f"  why: {what} runs in {'training' if longer is training else 'evaluation'} only, and one graph "
        "serves both modes; only dropout and batch norm follow them.\n"
        "  what to do: switch that behaviour off in the model's configuration (a drop-path, layer-drop or "
        "noise rate of 0), or move it out of the traced model."
    )


def _steps(ghost: nn.Module, example: Example, mode: FakeTensorMode) -> list[Step]:
    args, kwargs = example.call(ghost_arguments(dict(example.arguments), mode, torch.float32, torch.float32))
    recorder = _Recorder()
    with torch.no_grad(), mode, recorder:
        ghost(*args, **kwargs)
    return recorder.steps


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        frame = sys._getframe(1)
        inside = frame.f_code.co_filename
        while frame.f_back is not None and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        if name not in FOLLOWED and name != "__get__" and not inside.endswith("batchnorm.py"):
            self.steps.append((name, frame.f_code.co_filename, frame.f_lineno))
        return func(*args, **(kwargs or {}))
