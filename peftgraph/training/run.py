"""`TrainingRun`: what the passes of a program do while it trains, for a loop that calls it once a step.

run = tuned.training(net, steps=1000)
for batch in batches:
    (loss(net, batch) + run.penalty()).backward()
    run.before_step()        # needed by methods that change gradients alone
    optimizer.step()
    run.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftgraph.errors import PeftGraphError
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.adapted_sites import adapted_sites
from peftgraph.rewrite.distributed import plain_name
from peftgraph.rewrite.training_hooks import TrainingHooks
from peftgraph.sites import Sites

STEP = "step"


class Trains(Protocol):
    """A program, as callbacks see it."""

    def training(self, net: nn.Module, steps: int) -> TrainingRun:
        """Start a training; see `Program.training`."""
        ...


class TrainingRun:
    """One training of a program's module: the terms of the loss, and the work of each step.

    Attributes:
        steps: how many steps of the optimiser the training has.
        finished: how many of them are done.
    """

    def __init__(self, hooks: Mapping[str, TrainingHooks], parameters: Iterable[nn.Parameter], steps: int) -> None:
        self.steps, self.finished = steps, 0
        self._hooks = dict(hooks)
        self._parameters = list(parameters)
        self._prepared = self._penalised = False

    def penalty(self) -> Tensor:
        """Compute what the methods add to the loss: a scalar that gradients flow through; 0 where there is none."""
        self._penalised = True
        terms = [term for term in (hook.penalty(self.finished) for hook in self._hooks.values()) if term is not None]
        return sum(terms[1:], terms[0]) if terms else self._zero()

    def _zero(self) -> Tensor:
        like = self._parameters[0] if self._parameters else torch.zeros(())
        return torch.zeros((), dtype=like.dtype, device=like.device)

    def before_step(self) -> None:
        """Let the methods change gradients: after `backward`, before `optimizer.step`; nothing where none does.

        Raises:
            PeftGraphError: the training is over.
        """
        self._check_open()
        for hook in self._hooks.values():
            hook.before_step(self.finished)
        self._prepared = True

    def step(self) -> None:
        """Let the methods change parameters: after `optimizer.step`, before `optimizer.zero_grad`.

        Raises:
            PeftGraphError: the training is over, a method needs gradients that are gone, or one changes gradients and
                `before_step` was not called.
        """
        self._check_open()
        self._check_calls()
        for hook in self._hooks.values():
            hook.after_step(self.finished)
        self.finished += 1
        self._prepared = self._penalised = False

    def _check_open(self) -> None:
        if self.finished >= self.steps:
            raise PeftGraphError(
                f"The training was declared with steps={self.steps}, and all are done. Declare the number of steps "
                "of the whole training: tuned.training(net, steps=...)."
            )

    def _check_calls(self) -> None:
        """Check that the loop called all that this step needs."""
        for word, hook in self._hooks.items():
            method = word.partition(".")[2]
            if not self._prepared and type(hook).before_step is not TrainingHooks.before_step:
                raise PeftGraphError(f"{method} changes gradients: call run.before_step() before optimizer.step().")
            if not self._penalised and hook.penalty(self.finished) is not None:
                raise PeftGraphError(
                    f"{method} has a term of the loss, and run.penalty() was not called for this step: "
                    "(loss + run.penalty()).backward()."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to continue: tensors by name, and the number of finished steps."""
        state: dict[str, Any] = {STEP: torch.tensor(self.finished)}
        for word, hook in self._hooks.items():
            state |= {f"{word}/{name}": value.detach().clone() for name, value in hook.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            PeftGraphError: it is the state of other passes.
        """
        words = {name.partition("/")[0] for name in state if name != STEP}
        unknown = sorted(words - self._hooks.keys())
        if STEP not in state or unknown:
            what = f"a state of {unknown[0]}, which this program has not" if unknown else "no number of steps"
            raise PeftGraphError(f"The state of the training holds {what}; it belongs to another run.")
        for word, hook in self._hooks.items():
            start = f"{word}/"
            own = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            try:
                hook.load_state_dict(own)
            except KeyError as error:
                raise PeftGraphError(f"The state of the training lacks {error} of {word}.") from None
        self.finished = int(state[STEP])
        self._prepared = self._penalised = False


def start_training(program: ProgramData, sites: Sites, net: nn.Module, steps: int) -> TrainingRun:
    """Start a training of a program's module.

    Args:
        program: the program that the module was made of.
        sites: its sites.
        net: `program.module()`, or a wrapper of it (DistributedDataParallel, torch.compile, FSDP).
        steps: how many steps the optimiser will do.

    Raises:
        PeftGraphError: there are no passes or no steps, or the module is another program's.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise PeftGraphError(f"steps is the number of steps of the optimiser, at least 1, got {steps!r}.")
    if not program.history:
        raise PeftGraphError("No pass was applied, so there is nothing to train.")
    named = dict(net.named_parameters(remove_duplicate=False))
    parameters = {plain_name(name): one for name, one in named.items()} | named
    hooks: dict[str, TrainingHooks] = {}
    for i, applied in enumerate(program.history):
        made = applied.method.training_hooks(adapted_sites(program, sites, i, parameters), steps)
        if made is not None:
            hooks[f"{i}.{applied.method.word}"] = made
    trainable = [parameters[name] for name in program.table.trainable if name in parameters]
    return TrainingRun(hooks, trainable, steps)
