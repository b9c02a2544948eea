"""`check_pass` checks a pass of your own against the laws that every pass must satisfy; an error names the broken one.

    check_pass(VeRA(rank=2))

The laws, in order: "spec" (it prints and parses back), "identity" (a fresh pass changes nothing), "effect" (with other
parameters it does), "gradients" (they reach exactly what trains), "fold" (folded weights give the same outputs),
"files" (a saved adapter loads to the bit), "determinism" (two applications under one seed are equal), "base" (the
program that it was applied to is unchanged) and "removal" (without it the base's text is back).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from peftgraph.errors import CallError, NoFold, PeftGraphError, RecipeError
from peftgraph.program import Program, fold, trace
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.registry import temporarily_registered
from peftgraph.rewrite.spec import parse_pass

LAWS = ("spec", "identity", "effect", "gradients", "fold", "files", "determinism", "base", "removal")


class LawError(AssertionError):
    """A pass breaks a law.

    Attributes:
        law: one of `LAWS`.
    """

    def __init__(self, law: str, method: Pass, problem: str) -> None:
        self.law = law
        super().__init__(f"{method} breaks the law {law!r}: {problem}")


class SmallTransformer(nn.Module):
    """A pre-norm decoder of one block, with distinct sizes, that most passes can be applied to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 23)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x))


def check_pass(
    method: Pass,
    model: nn.Module | None = None,
    example: Mapping[str, Any] | None = None,
    *,
    identity: bool = True,
) -> tuple[str, ...]:
    """Check a pass against the laws, in float64.

    Args:
        method: the pass. Its class need not be registered: it is registered during the check.
        model: what to apply it to; a small transformer by default.
        example: keyword inputs of the model.
        identity: whether a fresh pass is to change nothing; False for prompts, prefixes and passes with random
            initialisation.

    Returns:
        The names of the laws that were checked; "fold" only where the pass folds.

    Raises:
        LawError: it breaks a law; the message says which.
        PeftGraphError: it cannot be applied to the model.

    Example:
        ```python
        def test_vera():
            assert "fold" in check_pass(VeRA(rank=2))
        ```
    """
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, example = SmallTransformer(), {"input_ids": torch.randint(23, (2, 7))}
    if example is None:
        raise CallError("check_pass needs an example of the inputs of a model of your own.")
    base = trace(copy.deepcopy(model).double(), example)
    check = _Check(method, base, dict(example), identity)
    with temporarily_registered(type(atom) for atom in method.passes()):
        return check.run()


class _Check:
    """The laws, for one pass on one program."""

    def __init__(self, method: Pass, base: Program, inputs: Mapping[str, Any], identity: bool) -> None:
        self.method, self.base, self.inputs, self.identity = method, base, inputs, identity
        self.text, self.hashes, self.outputs = base.text(), base.table.hashes(), _outputs(base, inputs)

    def run(self) -> tuple[str, ...]:
        """Check every law; return the names of those that apply."""
        self.spec()
        tuned = self.applied()
        fresh = _distance(self.outputs, _outputs(tuned, self.inputs))
        if self.identity:
            self.require("identity", fresh == 0, f"a fresh one changes the outputs by {fresh:.1e}.")
        again = self.applied()
        self.require("determinism", tuned.text() == again.text(), "applied twice it gives two texts.")
        self.require("determinism", tuned.table.hashes() == again.table.hashes(), "one seed gives two initial values.")
        _randomise(tuned)
        changed = _distance(self.outputs, _outputs(tuned, self.inputs))
        self.require("effect", changed > 0, "with random parameters it changes nothing.")
        self.gradients(tuned)
        folds = self.folds(tuned)
        self.files(tuned)
        removed = tuned
        while removed.history:
            removed = removed.remove()
        self.require("removal", removed.text() == self.text, "without it the text is not the base's.")
        self.require("removal", removed.table.hashes() == self.hashes, "without it the weights are not the base's.")
        left = self.base.text() == self.text and self.base.table.hashes() == self.hashes
        self.require("base", left, "the program that it was applied to has changed.")
        skipped = {"identity": not self.identity, "fold": not folds}
        return tuple(law for law in LAWS if not skipped.get(law))

    def require(self, law: str, holds: bool, problem: str) -> None:
        """Raise `LawError` unless `holds`."""
        if not holds:
            raise LawError(law, self.method, problem)

    def applied(self) -> Program:
        """Apply the pass under a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.base.apply(self.method)

    def spec(self) -> None:
        """Check that the printed pass parses back to itself."""
        try:
            parsed = parse_pass(str(self.method))
        except RecipeError as error:
            raise LawError("spec", self.method, str(error)) from error
        self.require("spec", parsed == self.method, f"its spec parses to {parsed}.")

    def gradients(self, tuned: Program) -> None:
        """Check that exactly the parameters that train get gradients."""
        net = tuned.module().eval()
        parameters = {name: value for name, value in net.named_parameters() if value.requires_grad}
        self.require("gradients", parameters.keys() == tuned.table.trainable.keys(), "other parameters require grad.")
        if not parameters:
            return  # a pass that changes how the base is stored, or what it computes, and trains nothing
        loss = torch.stack([out.square().sum() for out in _tensors(net(**self.inputs))]).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            reached = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
            self.require("gradients", reached, f"{name} trains, and its gradient is missing, zero or not finite.")

    def folds(self, tuned: Program) -> bool:
        """Fold the program; return whether it can be folded."""
        try:
            folded = fold(tuned)
        except NoFold as error:
            promised = all(not isinstance(rule.fold, str) for rule in self.method.rules())
            self.require("fold", not promised, str(error))
            return False
        except (PeftGraphError, RuntimeError) as error:
            raise LawError("fold", self.method, str(error)) from error
        self.require("fold", folded.text() == self.text, "the folded text is not the base's.")
        far = _distance(_outputs(tuned, self.inputs), _outputs(folded, self.inputs))
        self.require("fold", far < 1e-10, f"the folded outputs differ by {far:.1e}.")
        return True

    def files(self, tuned: Program) -> None:
        """Check that a saved adapter loads exactly."""
        with TemporaryDirectory() as folder:
            loaded = self.base.load_adapter(tuned.save_adapter(Path(folder) / "adapter"))
        self.require("files", loaded.text() == tuned.text(), "a loaded adapter gives another text.")
        self.require("files", loaded.table.hashes() == tuned.table.hashes(), "a loaded adapter has other values.")


def _randomise(program: Program) -> None:
    """Fill the trainable parameters with random numbers from a fixed seed."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in program.table.trainable.values():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3)


def _outputs(program: Program, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(program.module().eval()(**inputs))


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest magnitude; infinite where the shapes differ."""
    if [one.shape for one in a] != [one.shape for one in b]:
        return float("inf")
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in zip(a, b, strict=True))
