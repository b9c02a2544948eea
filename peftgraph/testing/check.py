"""Checks a pass on several models, and reports which laws it holds on each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from peftgraph.errors import NoMatch, PeftGraphError
from peftgraph.program import trace
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.registry import temporarily_registered
from peftgraph.testing.laws import LAWS
from peftgraph.testing.models import MODELS, SmallModel, small_model
from peftgraph.testing.subject import Base, Subject


@dataclass(frozen=True)
class Report:
    """The laws that a pass holds; prints as a table.

    Attributes:
        method: the pass.
        held: by model, whether each law was held; False where it has no meaning there, as folding where it is refused.
        unmatched: by model, why the pass does not apply to it.
    """

    method: Pass
    held: Mapping[str, Mapping[str, bool]]
    unmatched: Mapping[str, str]

    @property
    def laws(self) -> tuple[str, ...]:
        """The laws that were held on some model, in order."""
        return tuple(law for law in LAWS if any(laws[law] for laws in self.held.values()))

    def __contains__(self, law: object) -> bool:
        return law in self.laws

    def __iter__(self) -> Iterator[str]:
        return iter(self.laws)

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.held, *self.unmatched))
        lines = [
            f"  {name:<{width}}  {', '.join(law for law in LAWS if laws[law])}" for name, laws in self.held.items()
        ]
        lines += [f"  {name:<{width}}  does not apply: {why.splitlines()[0]}" for name, why in self.unmatched.items()]
        return "\n".join([f"{self.method} holds", *lines])


def check_pass(
    method: Pass,
    models: Sequence[str | SmallModel] = tuple(MODELS),
    *,
    identity: bool = True,
    near: Sequence[str] = (),
    tolerance: float = 1e-10,
) -> Report:
    """Check a pass against the laws (`LAWS`), in float64, on every model that it applies to.

    Args:
        method: the pass. Its class need not be registered: it is registered during the check.
        models: names of built-in models (`MODELS`: a decoder, an encoder, both together, one of pictures), or models of
            your own.
        identity: whether a fresh pass is to change nothing; False for prompts, prefixes and passes with random
            initialisation.
        near: the ends of the names of random parameters that keep a fresh pass from being exactly the identity.
        tolerance: the largest relative difference of outputs that counts as rounding.

    Raises:
        LawError: it breaks a law; the message says which, on which model and where, what was expected and what found.
        NoMatch: it applies to none of the models.
        PeftGraphError: there is no such built-in model.

    Example:
        ```python
        def test_vera():
            assert "fold" in check_pass(VeRA(rank=2))
        ```
    """
    held: dict[str, dict[str, bool]] = {}
    unmatched: dict[str, NoMatch] = {}
    with temporarily_registered(type(atom) for atom in method.passes()):
        for one in models:
            base = _built_in(one) if isinstance(one, str) else _base_of(one)
            try:
                subject = Subject(base, (method,), tuple(near), not identity, tolerance=tolerance)
            except NoMatch as error:
                unmatched[base.name] = error
                continue
            held[base.name] = {name: law(subject) for name, law in LAWS.items()}
    if not held:
        raise next(iter(unmatched.values()), PeftGraphError("There is no model to check the pass on."))
    return Report(method, held, {name: str(error) for name, error in unmatched.items()})


@cache
def _built_in(name: str) -> Base:
    if name not in MODELS:
        raise PeftGraphError(f"There is no built-in model {name!r}; there are {', '.join(MODELS)}.")
    return _base_of(small_model(name))


def _base_of(one: SmallModel) -> Base:
    inputs = {name: _double(value) for name, value in one.inputs.items()}
    return Base.of(one.name, trace(copy.deepcopy(one.model).double(), inputs), inputs)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
