"""UniPELT (Mao et al., 2022): several methods in one block, each scaled by a gate that reads its input.

    join(y, delta)   ->   join(y, G delta),   G = mean over t of sigmoid(w x_t + b), one number for each example
    no fold: the gate depends on the input

Any methods that add computation: the deltas of LoRA and adapters are multiplied by G, and so are the keys and values
of a prefix. x is the method's input: the attention's input for LoRA and the prefix, the adapter's own input for the
adapter. G replaces LoRA's alpha / rank, so alpha equals the rank here. In the paper and its code the mean includes
padding, so outputs depend on it: with tokens_only=true it is over tokens only. gates: "method" is the paper's text,
one for each method in a layer (and attention); "site" the code's, which has one for each of q and v; "shared" has
one in a layer for all methods, which the paper's published counts have.
Shapes: B batch, T positions, D features of x, w (1, D), b (1,). They are initialised as in torch.nn.Linear (in the
code those of the adapter are normal with std 0.02 and b = 0).
Source: arXiv 2110.07577, section 3.2; morningmoni/UniPELT, transformers/adapters/modeling.py and lora_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor, fx

from peftgraph.authoring import Builder, Match, Pass, Rule
from peftgraph.authoring.gates import Gate, gated, masked_mean
from peftgraph.authoring.modules import init
from peftgraph.authoring.training import AdaptedSite, SeveralHooks, TrainingHooks

from .lora import LoRA
from .pfeiffer import Pfeiffer
from .prefix import Prefix

Make = Callable[[str, Sequence[int], Callable[[Tensor], None]], fx.Node]
PARTS: tuple[Pass, ...] = (LoRA(rank=8, alpha=8.0), Prefix(length=10, hidden=512), Pfeiffer(width=48))


@dataclass(frozen=True, kw_only=True)
class UniPELT(Pass):
    """Gates over methods.

    Attributes:
        methods: the passes that are gated; several of one class need names.
        gates: "method", "site" or "shared".
        tokens_only: whether the mean excludes padding.
    """

    word = "unipelt"
    methods: tuple[Pass, ...] = PARTS
    gates: Literal["method", "site", "shared"] = "method"
    tokens_only: bool = False

    def check(self) -> None:
        """Refuse unknown words, an empty list of methods, pipelines, and two methods that are not distinguishable."""
        self.require_one_of("gates", ("method", "site", "shared"))
        self.require(len(self.methods) > 0, "it needs at least one method.")
        for one in self.methods:
            self.require(one.passes() == (one,), f"{one.word} is a pipeline; give its parts.")
        labels = [(one.word, one.name) for one in self.methods]
        self.require(len(set(labels)) == len(labels), "two of its methods are of one sort; give them different names.")

    def rules(self) -> list[Rule]:
        """Return the rules of all methods, gated; the model's own parameters that a method trains are not gated."""
        return [
            rule if rule.delta is None else gated(rule, self.gate(one)) for one in self.methods for rule in one.rules()
        ]

    def training_hooks(self, sites: Sequence[AdaptedSite], steps: int) -> TrainingHooks | None:
        """Make the hooks of all methods."""
        found: list[TrainingHooks] = []
        first = 0
        for one in self.methods:
            count = len(one.rules())
            own = [replace(site, rule=site.rule - first) for site in sites if first <= site.rule < first + count]
            made = one.training_hooks(own, steps)
            found += [] if made is None else [made]
            first += count
        return SeveralHooks(found) if found else None

    def finalized(self) -> Self:
        """Return the same gates over the finalized methods."""
        return replace(self, methods=tuple(one.finalized() for one in self.methods))

    def gate(self, method: Pass) -> Gate:
        """G of one method."""

        def gate(m: Match, op: Builder, x_BTD: fx.Node) -> fx.Node:
            who = "" if self.gates == "shared" else "_".join(part for part in (method.word, method.name) if part)
            if self.gates == "site":
                return self.opening(m, op, x_BTD, op.param, f"{who}_gate")
            where = [m.site.stack, None if m.site.layer is None else f"layer{m.site.layer}"]
            where += [m.site.kind] if self.gates == "method" else []
            name = "_".join(part for part in (*where, who, "gate") if part)
            return op.shared_value(name, lambda: self.opening(m, op, x_BTD, op.shared_param, name))

        return gate

    def opening(self, m: Match, op: Builder, x_BTD: fx.Node, make: Make, name: str) -> fx.Node:
        """Return the gate: the mean of sigmoid(w x + b) over positions, (B,)."""
        width = int(x_BTD.meta["val"].shape[-1])
        weight_1D = make(f"{name}_weight", (1, width), init.kaiming)
        bias_1 = make(f"{name}_bias", (1,), init.uniform(width**-0.5))
        return masked_mean(m, op, op.activation("sigmoid", op.linear(x_BTD, weight_1D, bias_1)), self.tokens_only)
