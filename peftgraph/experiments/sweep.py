"""Trains variants of a recipe together over one frozen base: each row of a batch belongs to one of them.

Every variant sees the same batches, in the same order, and is what it would be if it trained alone: its loss is the
mean over its own rows, its parameters are a group of the optimiser, and nothing else of it is shared. With dropout, the
masks are others than alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import peftgraph as pg
from peftgraph.errors import PeftGraphError
from peftgraph.losses import adapter_means, adapter_sums, label_losses
from peftgraph.rewrite.adapted_sites import adapted_sites
from peftgraph.rewrite.method import Pass

Batch = Mapping[str, Tensor]
LABELS = "labels"
LONG = 1_000_000  # steps, which any schedule fits


@dataclass(frozen=True)
class Variant:
    """One of the trainings of a sweep.

    Attributes:
        method: its passes.
        lr: its peak learning rate.
    """

    method: Pass
    lr: float


@dataclass
class Sweep:
    """Several trainings over one base.

    Attributes:
        variants: by name.
        programs: the base with the passes of each, and its own parameters.
        net: a module of all, whose rows name theirs.
        causal: whether the logits of a token predict the label of the next one.
        losses: of the steps so far, one for each variant.
    """

    variants: Mapping[str, Variant]
    programs: Mapping[str, pg.Program]
    net: Any
    causal: bool
    losses: list[list[float]]

    @classmethod
    def of(cls, program: pg.Program, variants: Mapping[str, Variant], causal: bool, seed: int = 0) -> Sweep:
        """Apply the passes of each variant, under one seed, and put all into one graph.

        Raises:
            PeftGraphError: a pass takes part in training, as AdaLoRA, or the variants cannot be in one graph.
        """
        programs = {name: _applied(program, one.method, seed) for name, one in variants.items()}
        net = program.serve(programs, trainable=True).module()
        return cls(dict(variants), programs, net, causal, [])

    def train(self, batches: Iterable[Batch], steps: int, weight_decay: float = 0.01, warmup: float = 0.0) -> None:
        """Do steps of AdamW; the learning rates rise linearly, then fall linearly to 0.

        Args:
            batches: inputs with labels, at least as many as steps.
            steps: of the optimiser.
            weight_decay: of AdamW.
            warmup: the share of the steps in which the learning rates rise.

        Raises:
            PeftGraphError: there are fewer batches than steps.
        """
        groups = self.net.optimiser_groups(**{name: {"lr": one.lr} for name, one in self.variants.items()})
        optimiser = torch.optim.AdamW(groups, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps, warmup))
        self.net.train()
        todo = iter(batches)
        for _ in range(steps):
            batch = next(todo, None)
            if batch is None:
                raise PeftGraphError(f"There are {len(self.losses)} batches for {steps} steps.")
            logits, labels, ids = self._call(batch)
            values, mask = label_losses(logits, labels, self.causal)
            means = adapter_means(values, ids, len(self.variants), mask)
            means.sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            self.losses.append(means.tolist())

    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """Return for each variant the mean loss of a causal model's tokens, or the accuracy of a classifier."""
        self.net.eval()
        sums = numbers = torch.zeros(len(self.variants), dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                logits, labels, ids = self._call(batch)
                values, mask = label_losses(logits, labels, self.causal)
                values = values if self.causal else (logits.argmax(-1) == labels).to(values.dtype)
                total, number = adapter_sums(values, ids, len(self.variants), mask)
                sums, numbers = sums + total.double().cpu(), numbers + number.double().cpu()
        return (sums / numbers.clamp(min=1)).tolist()

    def _call(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Run every variant on a batch; return the logits, the labels, and the adapter of each row."""
        count = len(self.variants)
        rows = {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in batch.items() if value.dim()}
        labels = rows.pop(LABELS)
        ids = torch.arange(1, count + 1, device=labels.device).repeat_interleave(len(labels) // count)
        return self.net(**rows, adapter_ids=ids).logits, labels, ids


def rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor of a learning rate that rises linearly, then falls linearly to 0, as the Trainer's."""
    rising = round(warmup * steps)
    return step / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))


def shuffled(rows: Sequence[Any], size: int, seed: int) -> Iterator[list[Any]]:
    """Yield batches of rows without end, each row once in an epoch, in orders that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [rows[i] for i in order[start : start + size]]


def _applied(program: pg.Program, method: Pass, seed: int) -> pg.Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = program.apply(method)
    for i, applied in enumerate(tuned.history):
        sites = adapted_sites(tuned, tuned.sites, i, tuned.table.tensors())
        for atom in applied.method.passes():
            if atom.training_hooks(sites, LONG) is not None:
                raise PeftGraphError(f"{atom} takes part in its training, so it trains alone: peftgraph train.")
    return tuned
