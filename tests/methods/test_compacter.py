"""Compacter: the sum of Kronecker products and its gradients, the shared rule, how it starts, what is never formed."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu

import peftgraph as pg
from peftgraph.passes import Compacter, CompacterPP

D, M, N = zoo.WIDTH, 8, 4


class Product(nn.Module):
    """x W + b with W = sum_i kron(A_i, W_i) formed; W_i is whole, or the product of two factors."""

    def __init__(self, inner: int, out: int, rule: nn.Parameter, rank: int | None) -> None:
        super().__init__()
        shapes = {"weight": (inner // N, out // N)}
        if rank is not None:
            shapes = {"left": (inner // N, rank), "right": (rank, out // N)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(N, *shape, dtype=torch.float64)))
        self.rule, self.bias = rule, nn.Parameter(torch.zeros(out, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.left @ self.right if hasattr(self, "left") else self.weight
        return x @ sum(torch.kron(a, w) for a, w in zip(self.rule, blocks, strict=True)) + self.bias


def rule() -> nn.Parameter:
    return nn.Parameter(torch.zeros(N, N, N, dtype=torch.float64))


CASES = [(1, True), (3, True), (1, False), (None, True), (None, False)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("rank", "shared"), CASES)
def test_equation(bench: Any, rank: int | None, shared: bool, training: bool) -> None:
    method = Compacter(width=M, n=N, rank=rank, shared=shared, dropout=0.2)
    tuned = zoo.randomise(bench.program.apply(method), 0.4)
    reference = bench.plain()
    block = reference.stack[0]
    block.rule = rule() if shared else None
    same: dict[str, Tensor] = {"compacter.phm_rule": block.rule} if shared else {}
    sides: dict[str, dict[str, Product]] = {}
    for site in ("attention", "ffn"):
        for side, sizes in (("down", (D, M)), ("up", (M, D))):
            product = Product(*sizes, block.rule if shared else rule(), rank)
            sides.setdefault(site, {})[side] = product
            block.register_module(f"{site}_{side}", product)
            named = {name: p for name, p in product.named_parameters() if not (shared and name == "rule")}
            same |= {f"stack.0.{site}_compacter.{side}_{name}": p for name, p in named.items()}

    def undropped(site: str, h: Tensor, *_: Tensor) -> Tensor:
        narrow = gelu(sides[site]["down"](h), approximate="tanh")
        return h + sides[site]["up"](nn.functional.dropout(narrow, 0.2, training))

    plain.rewrite(block, undropped=undropped)
    bench.agree(tuned, reference, same | plain.norms(reference), training)


def test_no_full_matrix_is_formed(bench: Any) -> None:
    """Nothing the pass computes has as many values as a weight of the bottleneck, apart from rows of tokens."""
    tuned = bench.program.apply(Compacter(width=M, n=N))
    own = {name for edit in tuned.edits for name in edit.nodes}
    values = [node.meta["val"] for node in tuned.graph.nodes if node.name in own]
    stored = [value for value in values if all(isinstance(size, int) for size in value.shape)]
    assert stored
    assert max(value.numel() for value in stored) < D * M


def test_how_it_starts(bench: Any) -> None:
    p = bench.program.apply(Compacter(width=M, n=N)).table.trainable
    bound = (2 * 6 / (D // N + 1)) ** 0.5
    for end in ("down_left", "up_right"):
        deviation, largest = plain.std_of(p, end)
        assert 0.9 * bound < largest <= bound
        assert deviation == pytest.approx(bound / 3**0.5, rel=0.2)
    assert plain.std_of(p, "phm_rule")[0] == pytest.approx(1e-4, rel=0.3)
    assert plain.std_of(p, "down_bias")[1] == plain.std_of(p, "up_bias")[1] == 0
    p = bench.program.apply(Compacter(width=M, n=N, init="xavier_normal", shared=False)).table.trainable
    assert plain.std_of(p, "down_left")[0] == pytest.approx((2 / (D // N + 1)) ** 0.5, rel=0.3)
    assert plain.std_of(p, "_rule")[0] == pytest.approx(1e-2, rel=0.3)


def test_one_rule_for_the_whole_model() -> None:
    p = zoo.traced("t5").apply(Compacter(width=M, norms=False)).table.trainable
    assert [name for name in p if name.endswith("rule")] == ["compacter.phm_rule"]
    assert sum(value.numel() for value in p.values()) == 8 * 3 * (D + M) + N**3
    two = zoo.traced("bert").apply(Compacter(width=M, norms=False, name="a"), CompacterPP(width=M, norms=False))
    assert {name for name in two.table.trainable if name.endswith("rule")} == {
        "compacter.a.phm_rule",
        "compacter_pp.phm_rule",
    }


def test_plus_plus_stands_after_the_feed_forward_alone(bench: Any) -> None:
    assert {edit.site for edit in bench.program.apply(CompacterPP(width=M, norms=False)).edits} == {"0.ffn"}


def test_it_refuses(bench: Any) -> None:
    for options, message in (
        ({"width": 6}, "n=4 does not divide width=6"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1 or none, got 0"),
        ({"place": "x"}, 'place must be "before_dropout" or "after_dropout" or "residual_sum"'),
    ):
        with pytest.raises(pg.RecipeError, match=message):
            Compacter(**options)
    with pytest.raises(pg.RecipeError, match=r"n=5 does not divide the 48 features of 0\.attention"):
        bench.program.apply(Compacter(width=10, n=5))


@settings(max_examples=30)
@given(
    width=st.integers(1, 64).map(lambda k: 4 * k),
    rank=st.none() | st.integers(1, 4),
    shared=st.booleans(),
    init=st.sampled_from(["xavier_uniform", "xavier_normal"]),
    place=st.sampled_from(["before_dropout", "after_dropout", "residual_sum"]),
)
def test_spec_round_trip(**options: Any) -> None:
    for method in (Compacter(**options), CompacterPP(**options)):
        assert pg.parse_pass(str(method)) == method
