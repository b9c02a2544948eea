"""The callback for transformers' Trainer: terms of the loss, the work of each step, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftgraph.errors import PeftGraphError
from peftgraph.training.run import TrainingRun, Trains
from peftgraph.utils.atomic_files import atomic_file

STATE = "peftgraph_training.safetensors"


class PassesCallback(TrainerCallback):
    """Lets the passes of a program take part in a training by transformers' Trainer.

        Trainer(tuned.module(), args, callbacks=[PassesCallback(tuned)], ...)

    What the passes add to the loss is added to `outputs.loss` of the module, once for each step of the optimiser. Their
    state is a file in each checkpoint, and is read where the Trainer resumes.

    Args:
        program: the program that the module was made of.
        add_penalty: whether the terms are added to the module's loss; off where `compute_loss` of a Trainer of your own
            adds `callback.run.penalty()`.

    Attributes:
        run: the training, once it has begun.
    """

    def __init__(self, program: Trains, add_penalty: bool = True) -> None:
        self._program = program
        self._add = add_penalty
        self.run: TrainingRun | None = None
        self._first = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Start the training, or continue the one of a checkpoint.

        Raises:
            PeftGraphError: the Trainer resumes, and the checkpoint has no state of the passes.
        """
        self.run = self._program.training(model, steps=state.max_steps)
        if state.global_step:
            self.run.load_state_dict(_read(args, state))
        self._hook = model.register_forward_hook(self._add_penalty, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the module as it was."""
        self._hook.remove()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the next call of the module is the first of a step."""
        self._first = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the passes change gradients, after they were clipped."""
        assert self.run is not None
        self.run.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the passes change parameters."""
        assert self.run is not None
        self.run.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of the passes into the checkpoint."""
        assert self.run is not None
        if state.is_world_process_zero:
            with atomic_file(_checkpoint(args, state) / STATE) as file:
                tensors = {name: value.contiguous() for name, value in self.run.state_dict().items()}
                safetensors.torch.save_file(tensors, str(file))

    def _add_penalty(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Add the passes' terms to the loss of a call in training."""
        if self.run is None or not module.training or not self._add:
            return outputs
        penalty = self.run.penalty()
        if not penalty.requires_grad:
            return outputs
        loss = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
        if loss is None:
            raise PeftGraphError(
                "A pass has a term of the loss, and the module gave no loss to add it to. Pass labels to the module, "
                "or make the callback with add_penalty=False and add its run.penalty() in the Trainer's compute_loss."
            )
        # A loss that is a mean over the items of all calls of a step is summed over these calls, any other averaged.
        summed = kwargs.get("num_items_in_batch") is not None
        if self._first or not summed:
            outputs["loss"] = loss + penalty
        self._first = False
        return outputs


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Return the state of the passes in the checkpoint that the Trainer resumes from.

    Raises:
        PeftGraphError: there is none.
    """
    given = args.resume_from_checkpoint
    folder = Path(given) if isinstance(given, str) and Path(given).is_dir() else _checkpoint(args, state)
    if not (folder / STATE).exists():
        raise PeftGraphError(
            f"The Trainer resumes at step {state.global_step}, and {folder} contains no {STATE}: it was not written "
            "with this callback, or is elsewhere (set resume_from_checkpoint in the TrainingArguments)."
        )
    return safetensors.torch.load_file(str(folder / STATE))
