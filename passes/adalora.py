"""AdaLoRA (Zhang et al., 2023): a low-rank path whose rank is learned, site by site, under one budget.

    y = x W^T + b   ->   y = x W^T + b + s ((drop(x) Q^T) diag(e)) P^T          s = alpha / (rank + 1e-5)
    fold: W <- W + s P diag(e) Q
    loss  +=  orthogonality * mean over all P and Q of ||P^T P - 1||_F, ||Q Q^T - 1||_F

Shapes: I in, O out, R the rank at the start; Q (R, I), e (R, 1), P (O, R); E experts as axis 0 of stacked weights.
P and Q are normal with standard deviation 0.02 and e is zero, so a fresh pass is the identity.
A triplet is one column of P, entry of e and row of Q. After every step of the optimiser, with w the new values and g
the gradients of that step,

    I = |w g|,   I' <- beta1 I' + (1 - beta1) I,   U' <- beta2 U' + (1 - beta2) |I - I'|
    importance of a triplet = (I' U')(e) + mean (I' U')(row of Q) + mean (I' U')(column of P)

and, every `interval` steps, e is set to zero where the importance is not among the b largest of all sites. It may grow
back. The budget b is R for each site up to step `warmup`, falls as the cube of the time that is left to `target_rank`
at `final` steps before the end, and there the triplets are chosen for good. Steps count from 0, as `enumerate` does.
`Program.finalize` turns the triplets in use into plain LoRAs, one for each rank that was learned. The paper squares the
norms in the loss; the authors' code, which this follows, does not, and its b uses (t - warmup) where the paper prints
another difference.
Source: arXiv 2303.10512, sections 3.1 and 3.2; QingruZhang/AdaLoRA, loralib/adalora.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import peftgraph as pg
from peftgraph.authoring import AddProduct, Builder, Match, ParameterValue, Params, Pass, Rule
from peftgraph.authoring.modules import LowRank, init
from peftgraph.authoring.training import (
    AdaptedSite,
    ParameterKey,
    PassWithValues,
    TrainingHooks,
    agreed,
    assign,
    full,
    selector_for,
)

from .lora import LoRA

aten = torch.ops.aten
MATRICES = pg.parse_selector("attention.*|ffn.*")
PARTS = ("adalora_Q", "adalora_e", "adalora_P")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Pass):
    """Low-rank adaptation with a learned distribution of ranks.

    Attributes:
        at: any projections or embeddings; all matrices of attentions and feed-forwards by default, as in the paper.
        rank: R, the rank of every site at the start; the paper takes 1.5 times `target_rank`.
        target_rank: the mean rank of a site at the end.
        alpha: the scale is alpha / (rank + 1e-5), whatever ranks are learned.
        dropout: on the input of the low-rank path only, in training.
        warmup: how many steps the budget stays at the start; the paper's t_i.
        final: how many steps train after the triplets are chosen; the paper's t_f.
        interval: how many steps lie between two choices.
        beta1: of the running mean of the sensitivity.
        beta2: of the running mean of its uncertainty.
        orthogonality: the weight of the term in the loss; the paper's gamma.
    """

    word = "adalora"
    at: pg.Selector = MATRICES
    rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    warmup: int = 0
    final: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def check(self) -> None:
        """Refuse ranks below 1, a target above the rank, and a schedule or decay that cannot be."""
        self.path.check(self)
        self.require(
            1 <= self.target_rank <= self.rank, f"target_rank must be 1 to {self.rank}, got {self.target_rank}."
        )
        self.require(self.warmup >= 0 and self.final >= 0, "warmup and final are numbers of steps, at least 0.")
        self.require(self.interval >= 1, f"interval must be at least 1, got {self.interval}.")
        self.require(0 < self.beta1 < 1 and 0 < self.beta2 < 1, "beta1 and beta2 must lie in (0, 1).")
        self.require(self.orthogonality >= 0, f"orthogonality must be at least 0, got {self.orthogonality}.")

    @property
    def path(self) -> LowRank:
        """The low-rank path without its middle factor."""
        return LowRank(rank=self.rank, dropout=self.dropout)

    @property
    def scale(self) -> float:
        """s = alpha / (rank + 1e-5)."""
        return self.alpha / (self.rank + 1e-5)

    def rules(self) -> list[Rule]:
        """Add the low-rank path to the projection's output."""
        return [
            Rule(
                at=self.at,
                delta=self.delta,
                join=AddProduct(turns=True),
                fold=self.fold,
                max_rank=self.learned_rank,
                row_axes=lambda m: {"adalora_P": -2},
                check=lambda sites: self.path.fits(self, sites),
            )
        ]

    def delta(self, m: Match, op: Builder) -> fx.Node:
        """Compute s ((drop(x) Q^T) diag(e)) P^T."""
        out, inner = m.shape
        q_RI = op.param("adalora_Q", (*m.experts, self.rank, inner), init.normal(0.02))
        e_R1 = op.param("adalora_e", (*m.experts, self.rank, 1), init.zeros)
        p_OR = op.param("adalora_P", (*m.experts, out, self.rank), init.normal(0.02))
        return op.mul(self.path.build(self, m, op, op.mul(q_RI, e_R1), p_OR), self.scale)

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        """Compute W + s P diag(e) Q."""
        return {m.weight: m.weight.value + self.scale * (p.adalora_P @ (p.adalora_e * p.adalora_Q))}

    def learned_rank(self, p: Params, every: Sequence[Params]) -> int:
        """Return the number of triplets in use, the largest of a stack's experts; R before training."""
        if p.adalora_e.device.type == "meta" or not any(bool(one.adalora_e.any()) for one in every):
            return self.rank
        return int((p.adalora_e.detach() != 0).sum((-2, -1)).max())

    def finalized_from(self, sites: pg.Sites, adapted: Sequence[AdaptedSite]) -> list[PassWithValues]:
        """Return one LoRA for each learned rank, with the triplets in use: A = diag(e) Q and B = P."""
        members: dict[int, list[AdaptedSite]] = {}
        for one in adapted:
            members.setdefault(int((one.parameters["adalora_e"] != 0).sum((-2, -1)).max()), []).append(one)
        return [self.as_lora(sites, rank, found) for rank, found in sorted(members.items()) if rank]

    def as_lora(self, sites: pg.Sites, rank: int, found: Sequence[AdaptedSite]) -> PassWithValues:
        """Make the LoRA at the sites that learned one rank."""
        values: dict[ParameterKey, Tensor] = {}
        for one in found:
            q_RI, e_R1, p_OR = (one.parameters[name].detach() for name in PARTS)
            order = torch.argsort((e_R1[..., 0] != 0).int(), dim=-1, descending=True, stable=True)[..., :rank, None]
            values[one.site.id, "lora_A"] = (e_R1 * q_RI).gather(-2, order.expand(*order.shape[:-1], q_RI.shape[-1]))
            values[one.site.id, "lora_B"] = p_OR.mT.gather(-2, order.expand(*order.shape[:-1], p_OR.shape[-2])).mT
        at = selector_for(sites, [one.site for one in found])
        return PassWithValues(
            LoRA(at=at, rank=rank, alpha=self.scale * rank, dropout=self.dropout, name=self.name), values
        )

    def training_hooks(self, sites: Sequence[AdaptedSite], steps: int) -> TrainingHooks:
        """Make the hooks that add the term of the loss and choose the triplets."""
        self.require(
            self.warmup < steps - self.final,
            f"warmup={self.warmup} and final={self.final} leave none of {steps} steps in which the ranks are chosen.",
        )
        return RankAllocator(self, sites, steps)


class RankAllocator(TrainingHooks):
    """Chooses triplets by their importance, under a budget for all sites together."""

    def __init__(self, method: AdaLoRA, sites: Sequence[AdaptedSite], steps: int) -> None:
        self.method, self.last = method, steps - method.final
        by_identity = {id(one.parameters["adalora_e"]): one for one in sites}  # uses of one weight share one adapter
        self.sites: dict[str, tuple[Tensor, ...]] = {
            one.site.id: tuple(one.parameters[name] for name in PARTS) for one in by_identity.values()
        }
        self.most = sum(e.numel() for _, e, _ in self.sites.values())
        self.least = sum(e.numel() // method.rank for _, e, _ in self.sites.values()) * method.target_rank
        self.state: dict[str, Tensor] = {}  # running means by site and part; the triplets that were kept

    def penalty(self, step: int) -> Tensor | None:
        """Compute orthogonality * mean ||Q Q^T - 1||, ||P^T P - 1|| over all matrices."""
        if not self.method.orthogonality:
            return None
        terms: list[Tensor] = []
        for q_RI, _, p_OR in (map(full, parts) for parts in self.sites.values()):
            for gram_RR in (q_RI @ q_RI.mT, p_OR.mT @ p_OR):
                eye = torch.eye(gram_RR.shape[-1], dtype=gram_RR.dtype, device=gram_RR.device)
                terms += list(torch.linalg.matrix_norm(gram_RR - eye).reshape(-1))
        return self.method.orthogonality * torch.stack(terms).mean()

    def budget(self, step: int) -> int:
        """Return how many triplets are kept after a step."""
        method = self.method
        if step <= method.warmup:
            return self.most
        if step >= self.last:
            return self.least
        left = 1 - (step - method.warmup) / (self.last - method.warmup)
        return int((self.most - self.least) * left**3 + self.least)

    def after_step(self, step: int) -> None:
        """Update the importance and set the triplets to zero that the budget leaves out; after the choice, again."""
        if step > self.last and "kept" in self.state:
            self.keep(self.state["kept"])
            return
        if step < self.last:
            self.observe()
        if step == self.last or (step > self.method.warmup and step % self.method.interval == 0):
            self.state["kept"] = agreed(self.choose(self.budget(step)))
            self.keep(self.state["kept"])

    @torch.no_grad()
    def observe(self) -> None:
        """Update the running means of sensitivity and uncertainty.

        Raises:
            PeftGraphError: there are no gradients.
        """
        for site, parameters in self.sites.items():
            for name, w in zip(PARTS, parameters, strict=True):
                if w.grad is None:
                    raise pg.PeftGraphError(
                        f"adalora: {name} at {site} has no gradient. Call run.step() after optimizer.step() and before "
                        "optimizer.zero_grad()."
                    )
                now = (full(w) * full(w.grad)).abs()
                key = f"{site}.{name}"
                mean = self.state.get(f"{key}.mean", torch.zeros_like(now))
                spread = self.state.get(f"{key}.spread", torch.zeros_like(now))
                mean = self.method.beta1 * mean + (1 - self.method.beta1) * now
                self.state[f"{key}.mean"] = mean
                self.state[f"{key}.spread"] = self.method.beta2 * spread + (1 - self.method.beta2) * (now - mean).abs()

    def importance(self, site: str) -> Tensor:
        """Return the importance of each triplet of a site, (R,), or (E R,) for stacked experts."""
        q_RI, e_R1, p_OR = (self.state[f"{site}.{name}.mean"] * self.state[f"{site}.{name}.spread"] for name in PARTS)
        return (e_R1[..., 0] + (q_RI.mean(-1) + p_OR.mean(-2))).reshape(-1)

    def choose(self, budget: int) -> Tensor:
        """Return which triplets of all sites, one after the other, are the `budget` most important; ties lose."""
        scores = torch.cat([self.importance(site) for site in self.sites])
        if budget >= len(scores):
            return torch.ones_like(scores, dtype=torch.bool)
        return scores > torch.kthvalue(scores, len(scores) - budget).values

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Set e to zero where a triplet is not kept."""
        sizes = [e.numel() for _, e, _ in self.sites.values()]
        for (_, e, _), own in zip(self.sites.values(), kept.split(sizes), strict=True):
            values = full(e)
            assign(e, values.masked_fill(~own.reshape(values.shape), 0.0))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running means and the triplets that were kept."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore them, on the devices of the parameters."""
        device = next(iter(self.sites.values()))[0].device
        self.state = {name: value.to(device) for name, value in state.items()}
