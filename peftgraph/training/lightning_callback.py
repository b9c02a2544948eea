"""The callback for Lightning: the work of each step, checkpoints."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from peftgraph.errors import PeftGraphError
from peftgraph.training.run import TrainingRun, Trains


def lightning_callback(program: Trains, net: nn.Module) -> Any:
    """Make the callback that lets the passes of a program take part in a training by Lightning.

    The training step adds `callback.run.penalty()` to its loss; the rest is done by the callback, whose state Lightning
    keeps in its checkpoints.

    Args:
        program: the program that the module was made of.
        net: the module, wherever the LightningModule holds it.

    Raises:
        PeftGraphError: neither `lightning` nor `pytorch_lightning` was imported.
    """
    library = sys.modules.get("lightning.pytorch") or sys.modules.get("pytorch_lightning")
    if library is None:
        raise PeftGraphError("Import lightning.pytorch or pytorch_lightning first: the callback is of its class.")

    class PassesCallback(library.Callback):
        """Calls a `TrainingRun`."""

        run: TrainingRun

        def __init__(self) -> None:
            self._state: dict[str, Any] = {}

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Start the training, or continue it."""
            self.run = program.training(net, steps=int(trainer.estimated_stepping_batches))
            if self._state:
                self.run.load_state_dict(self._state)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            """Let the passes change gradients."""
            self.run.before_step()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """Let the passes change parameters, where the optimiser did a step."""
            if trainer.global_step > self.run.finished:
                self.run.step()

        def state_dict(self) -> dict[str, Any]:
            """Return the state of the passes."""
            return self.run.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Keep a state until the training starts."""
            self._state = state_dict

    return PassesCallback()
