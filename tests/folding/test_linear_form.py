"""A fold is refused by its own reasons, before any output is compared: what a site computes must be x W^T + b in the
stored W and b, and nobody else may read what changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, linear

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, DoRA, LoRA

Form = Callable[["Odd", Tensor], Tensor]


class Odd(nn.Module):
    """A projection in an unusual spelling, between a norm and a head."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.norm, self.head, self.form = nn.LayerNorm(6), nn.Linear(6, 4), form
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.wide, self.long = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.form(self, self.norm(x))))


@cache
def traced(form: Form, device: str) -> pg.Program:
    return pg.trace(Odd(form).to(device).eval(), (torch.randn(2, 5, 6, device=device),))


def tuned(form: Form, method: Pass, device: str = "cpu") -> pg.Program:
    program = traced(form, device).apply(method)
    if device == "cpu":
        with torch.no_grad():
            for parameter in program.table.trainable.values():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return program


def clone_read_twice(m: Odd, x: Tensor) -> Tensor:
    w = m.w.clone()
    return linear(x, w, m.b) + w.mean(0)


METHODS = {"lora": LoRA(at="projection", rank=2), "ia3": IA3(at="projection"), "dora": DoRA(at="projection", rank=2)}
FACTOR, BIAS_FACTOR = "multiplies its product by 2, so that y is not", "multiplies the bias by 3"
PLACES, CAST = r"b is read in \d places", "is cast to torch.float16 on its way to the product"
ADDS, OTHERS = r"adds %.*, which is no bias that is stored", "that it adds are others than its weight's"
# name: (form, its methods that are refused, why)
FORMS: dict[str, tuple[Form, str, str]] = {
    "alpha": (lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w.t(), alpha=2), "lora ia3 dora", FACTOR),
    "beta": (lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w.t(), beta=3), "ia3 dora", BIAS_FACTOR),
    "batched": (lambda m, x: torch.baddbmm(m.b, x, m.w.t()[None].expand(x.shape[0], 6, 6), alpha=2),
                "lora ia3 dora", FACTOR),
    "added": (lambda m, x: torch.add(linear(x, m.w), m.b, alpha=3), "ia3 dora", BIAS_FACTOR),
    "scaled": (lambda m, x: linear(x, m.w, m.b * 2), "ia3 dora", ADDS),
    "signal": (lambda m, x: torch.addmm(x.flatten(0, 1), x.flatten(0, 1), m.w.t()), "ia3 dora", ADDS),
    "read": (lambda m, x: linear(x, m.w, m.b) + m.b.tanh(), "ia3", PLACES),
    "convolved": (lambda m, x: conv1d(x.mT, m.w[..., None], m.b).mT * m.b.exp(), "ia3", PLACES),
    "other-rows": (lambda m, x: linear(x, m.wide[:6], m.long[6:]), "ia3 dora", OTHERS),
    "flipped": (lambda m, x: linear(x, m.w, m.b.flip(0)), "ia3 dora", OTHERS),
    "rounded": (lambda m, x: linear(x, m.w.half().float(), m.b), "lora ia3 dora", CAST),
    "rounded-bias": (lambda m, x: linear(x, m.w, m.b.half().float()), "ia3 dora", CAST),
    "cloned": (clone_read_twice, "lora ia3 dora", "w is read in 2 places"),
}  # fmt: skip
KINDS = [(name, word) for name in FORMS for word in METHODS]


@pytest.mark.parametrize(("name", "word"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_what_is_no_product_and_bias_folds_exactly_or_not_at_all(name: str, word: str) -> None:
    form, refused, why = FORMS[name]
    program = tuned(form, METHODS[word])
    if word in refused.split() or (word == "dora" and why == PLACES):
        with pytest.raises(pg.NoFold, match=why):
            pg.fold(program)
    else:
        assert pg.fold(program).proof is not None


@pytest.mark.parametrize("name", ["alpha", "read", "cloned"])
def test_the_reasons_are_the_same_without_values(name: str) -> None:
    form, refused, why = FORMS[name]
    with pytest.raises(pg.NoFold, match=why):
        pg.fold(tuned(form, METHODS[refused.split()[0]], "meta"))


PLAIN: dict[str, Form] = {
    "rows": lambda m, x: linear(x, m.wide[6:], m.long[6:]),
    "turned": lambda m, x: x @ m.w + m.b,
    "turned-rows": lambda m, x: linear(x, m.w.flip(0)),
    "spread": lambda m, x: torch.baddbmm(m.b.expand(x.shape[0], 1, 6), x, m.w.t().expand(x.shape[0], 6, 6)),
}


@pytest.mark.parametrize("form", PLAIN.values(), ids=list(PLAIN))
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_other_spellings_of_the_same_fold(form: Form, method: Pass) -> None:
    assert pg.fold(tuned(form, method)).proof is not None


INDEX = torch.tensor([5, 4, 3, 2, 1, 0])
REARRANGED: dict[str, Form] = {
    "inputs-flipped": lambda m, x: linear(x, m.w.flip(1), m.b),
    "inputs-cut": lambda m, x: linear(x[..., :3], m.w[:, 3:], m.b),
    "repeated": lambda m, x: linear(x, m.w.repeat(2, 1))[..., :6],
    "by-index": lambda m, x: linear(x, m.w[INDEX.to(x.device)], m.b),
}


@pytest.mark.parametrize("form", REARRANGED.values(), ids=list(REARRANGED))
def test_a_weight_whose_inputs_are_rearranged_is_no_site(form: Form) -> None:
    with pytest.raises(pg.NoMatch):
        tuned(form, LoRA(at="projection", rank=2))


def test_a_weight_stored_in_half_precision_is_rounded_to_that() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(6, 6).bfloat16()), nn.Linear(6, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(linear(x, self.w.float())))

    program = pg.trace(Mixed().eval(), (torch.randn(2, 6),)).apply(LoRA(at="projection|head", rank=2))
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(0.3)
    folded = pg.fold(program)
    assert folded.table["w"].tensor.dtype == torch.bfloat16
    assert folded.proof is not None
    assert [probe.dtype for probe in folded.proof.probes[:2]] == ["float64", "float32"]
