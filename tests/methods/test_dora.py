"""DoRA: the equation on every form of a weight, its gradient, how it starts and folds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

import peftgraph as pg
from peftgraph.passes import IA3, DoRA, LoRA

D, F = zoo.WIDTH, zoo.FFN
F64 = torch.float64


class Decomposed(nn.Module):
    """y = x (M V / ||V||)^T + b, V = W + s B A, the norm a constant unless `through`; or what the adapters library has:
    the norm of W + B A, and b multiplied as the output is."""

    def __init__(
        self, base: nn.Linear, rows: slice, rank: int, scale: float, through: bool = False, theirs: bool = False
    ) -> None:
        super().__init__()
        self.base, self.rows, self.scale, self.through, self.theirs = base, rows, scale, through, theirs
        out, inner = base.weight[rows].shape
        self.a_RI = nn.Parameter(torch.zeros(rank, inner, dtype=F64))
        self.b_OR = nn.Parameter(torch.zeros(out, rank, dtype=F64))
        self.m_O = nn.Parameter(torch.ones(out, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        change_OI = self.b_OR @ self.a_RI
        v_OI = self.base.weight[self.rows] + self.scale * change_OI
        norm_O = (self.base.weight[self.rows] + change_OI if self.theirs else v_OI).square().sum(-1).sqrt()
        g_O = self.m_O / (norm_O if self.through else norm_O.detach())
        weight, bias = self.base.weight.clone(), self.base.bias.clone()
        weight[self.rows] = g_O[:, None] * v_OI
        if self.theirs:
            bias[self.rows] = g_O * self.base.bias[self.rows]
        return linear(x, weight, bias)


def same(path: str, module: Decomposed) -> dict[str, Tensor]:
    return {f"{path}.lora_A": module.a_RI, f"{path}.lora_B": module.b_OR, f"{path}.dora_m": module.m_O}


@pytest.mark.parametrize("form", ["paper", "adapters"])
@pytest.mark.parametrize("through", [False, True], ids=["constant", "differentiated"])
@pytest.mark.parametrize("at", ["attention.v", "ffn.down"])
def test_equation(bench: Any, at: str, through: bool, form: str) -> None:
    theirs = form == "adapters"
    method = DoRA(at=pg.parse_selector(at), rank=3, alpha=5.0, norm_gradient=through, form=form)  # pyright: ignore[reportArgumentType]
    tuned = zoo.randomise(bench.program.apply(method), 0.2)
    reference = bench.plain()
    block = reference.stack[0]
    if at == "ffn.down":
        block.proj = Decomposed(block.proj, slice(None), 3, 5 / 3, through, theirs)
        bench.agree(tuned, reference, same("stack.0.proj", block.proj))
    else:
        block.mix = Decomposed(block.mix, slice(2 * D, None), 3, 5 / 3, through, theirs)
        bench.agree(tuned, reference, same("stack.0.mix.v", block.mix))


def test_equation_on_an_embedding(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(DoRA(at="embedding", rank=3, alpha=6.0)), 0.2)
    p, table_VD = tuned.table, bench.program.table["tok.weight"].tensor
    v_DV = table_VD.T + 2 * p["tok.lora_B"].tensor @ p["tok.lora_A"].tensor
    wanted = (p["tok.dora_m"].tensor / v_DV.norm(dim=1))[:, None] * v_DV
    reference = bench.plain()
    reference.tok.weight.copy_(wanted.T.detach())
    outputs = [
        module.eval()(**bench.inputs)["logits"] for module in (tuned.module(), reference, pg.fold(tuned).module())
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(outputs[0], output, rtol=0, atol=1e-12)


def test_it_starts_at_the_norm_of_each_output(bench: Any) -> None:
    tuned = bench.program.apply(DoRA(rank=2))
    w = bench.program.table["stack.0.mix.weight"].tensor
    m = torch.cat([tuned.table[f"stack.0.mix.{role}.dora_m"].tensor for role in "qkv"])
    torch.testing.assert_close(m, w.square().sum(1).sqrt(), rtol=1e-14, atol=0)


def test_dropout_stands_on_the_low_rank_path_alone(bench: Any) -> None:
    """With B zero there is nothing to drop, whatever M is."""
    programs = [bench.program.apply(DoRA(at="attention.o", rank=2, dropout=p)) for p in (0.0, 0.9)]
    text = programs[1].text()
    assert text.count("dropout(") == bench.program.text().count("dropout(") + 1
    line = next(line for line in text.splitlines() if "lora_A" in line and "linear" in line)
    assert "dora.dropout" in line
    for program in programs:
        with torch.no_grad():
            program.table["stack.0.out.dora_m"].tensor.mul_(1.5)
    folded = [pg.fold(program).table["stack.0.out.weight"].tensor for program in programs]
    for weight in folded:
        torch.testing.assert_close(weight, 1.5 * bench.program.table["stack.0.out.weight"].tensor)


def test_slices_of_one_weight_fold_side_by_side(bench: Any) -> None:
    tuned = zoo.randomise(bench.program.apply(DoRA(at="attention.q", rank=2), DoRA(at="attention.v", rank=3)), 0.2)
    folded = pg.fold(tuned)
    ours, theirs = (program.module().eval()(**bench.inputs)["logits"] for program in (tuned, folded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    before, after = (p.table["stack.0.mix.weight"].tensor for p in (bench.program, folded))
    assert torch.equal(before[D : 2 * D], after[D : 2 * D])
    assert folded.table["stack.0.mix.bias"].tensor is bench.program.table["stack.0.mix.bias"].tensor


def test_it_folds_beside_other_passes_in_any_order(bench: Any) -> None:
    lora, dora = LoRA(at="attention.v", rank=2, name="first"), DoRA(at="attention.v", rank=2)
    for passes in ((dora, IA3(), lora), (lora, dora), (lora, dora, IA3())):
        tuned = zoo.randomise(bench.program.apply(*passes), 0.2)
        ours, theirs = (p.module().eval()(**bench.inputs)["logits"] for p in (tuned, pg.fold(tuned)))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert bench.program.apply(lora, dora).remove().remove().text() == bench.program.text()


def test_two_of_them_at_one_weight_do_not_fold(bench: Any) -> None:
    """Each norms the base's weight, which the fold of the other would change."""
    two = bench.program.apply(DoRA(at="attention.v", rank=2, name="a"), DoRA(at="attention.v", rank=2, name="b"))
    with pytest.raises(pg.NoFold, match="is read in"):
        pg.fold(two)


def test_a_row_of_zeros_has_no_direction() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight[1])  # pyright: ignore
    program = pg.trace(model.eval(), torch.randn(2, 5))
    with pytest.raises(pg.RecipeError, match="1 of 3 rows of the weight at projection.1 are zero"):
        program.apply(DoRA(at="linear", rank=1))


def test_size(bench: Any) -> None:
    count = bench.program.apply(DoRA(rank=2)).count()
    assert count.trainable == count.added == 3 * (2 * 2 * D + D) + 2 * (D + F) + F + 2 * (D + F) + D


def test_options_that_make_no_sense() -> None:
    with pytest.raises(pg.RecipeError, match="dora: rank must be at least 1, got 0"):
        DoRA(rank=0)
    with pytest.raises(pg.RecipeError, match=r"dora: dropout must lie in \[0, 1\), got 1"):
        DoRA(dropout=1)
    with pytest.raises(pg.RecipeError, match='dora: form must be "paper" or "adapters"'):
        DoRA(form="peft")  # pyright: ignore[reportArgumentType]


@settings(max_examples=20)
@given(
    at=st.sampled_from(["attention.q", "attention.*|ffn.*"]),
    rank=st.integers(1, 99),
    alpha=st.floats(allow_nan=False, allow_infinity=False),
    dropout=st.floats(0, 1, exclude_max=True),
    rank_stabilised=st.booleans(),
    norm_gradient=st.booleans(),
    form=st.sampled_from(["paper", "adapters"]),
)
def test_spec_round_trip(**options: Any) -> None:
    method = DoRA(**options)
    assert pg.parse_pass(str(method)) == method
