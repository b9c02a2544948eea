"""What a pass does while its parameters train: a term of the loss, work on gradients, work on parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


class TrainingHooks:
    """What one pass does while it trains; a subclass overrides what it needs.

    `step` counts the optimiser's steps from 0, as `enumerate` over batches does. Under data parallel training every
    process calls the hooks with equal gradients. Sharded parameters are DTensors: `peftgraph.authoring.training.full`
    and `assign` read and write them whole, and `agreed` makes a decision the first process's.
    """

    def penalty(self, step: int) -> Tensor | None:
        """Compute the term of the loss, a scalar tensor; None for no term."""
        return None

    def before_step(self, step: int) -> None:
        """Change gradients, in place, after the backward pass and before the optimiser's step."""

    def after_step(self, step: int) -> None:
        """Change parameters, in place, after the optimiser's step; their gradients are still there."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what must be saved to continue training."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


class SeveralHooks(TrainingHooks):
    """The hooks of several passes as one, for passes that are made of other passes."""

    def __init__(self, parts: Sequence[TrainingHooks]) -> None:
        self.parts = tuple(parts)

    def penalty(self, step: int) -> Tensor | None:
        """Compute the sum of all terms."""
        terms = [term for term in (part.penalty(step) for part in self.parts) if term is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def before_step(self, step: int) -> None:
        """Call each part."""
        for part in self.parts:
            part.before_step(step)

    def after_step(self, step: int) -> None:
        """Call each part."""
        for part in self.parts:
            part.after_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of all parts, each under its number."""
        return {f"{i}.{name}": value for i, part in enumerate(self.parts) for name, value in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore each part."""
        for i, part in enumerate(self.parts):
            start = f"{i}."
            part.load_state_dict(
                {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            )
