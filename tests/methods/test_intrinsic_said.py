"""Intrinsic SAID: the transform beside the matrix it stands for, one vector for all, seeds, and the exact fold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.authoring.modules import draw_fastfood, fastfood, run
from peftgraph.passes import IntrinsicSAID

F64, CPU = torch.float64, torch.device("cpu")


def hadamard(size: int) -> Tensor:
    """The matrix of signs: (-1) to the number of ones that two numbers share."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize(("size", "length"), [(1, 1), (5, 3), (64, 7), (100, 130), (2000, 10)])
def test_the_transform_is_its_matrix(size: int, length: int) -> None:
    drawn = draw_fastfood(3, "a.weight", size, length, CPU)
    total = len(drawn.signs)
    assert total >= max(size, length) > total // 2 or total == 1
    h = hadamard(total)
    matrix = h @ torch.diag(drawn.normal.to(F64)) @ torch.eye(total, dtype=F64)[drawn.order] @ h
    matrix = (matrix * drawn.signs)[:size, :length] / math.sqrt(size * float(drawn.normal.double().square().sum()))
    v = torch.randn(length, dtype=F64)
    parts = type(drawn)(drawn.signs.to(F64), drawn.order, drawn.normal.to(F64), drawn.hadamard.to(F64), drawn.divisor)
    assert torch.allclose(fastfood(run, v, length, size, parts), matrix @ v, rtol=1e-10, atol=1e-12)


def test_a_seed_gives_the_same_bits_everywhere() -> None:
    drawn = draw_fastfood(0, "w", 6, 2, CPU)
    assert drawn.signs.tolist() == SIGNS
    assert drawn.order.tolist() == ORDER
    assert drawn.normal.tolist() == pytest.approx(NORMAL, abs=0)
    assert not torch.equal(drawn.normal, draw_fastfood(1, "w", 6, 2, CPU).normal)
    assert not torch.equal(drawn.normal, draw_fastfood(0, "x", 6, 2, CPU).normal)


@pytest.mark.parametrize("layer_scales", [True, False])
def test_one_vector_moves_every_tensor(layer_scales: bool, tmp_path: Path) -> None:
    base = zoo.traced("nano", dtype=F64)
    method = IntrinsicSAID(dimension=50, layer_scales=layer_scales, seed=4)
    tuned = base.apply(method)
    tensors = 12 + 18
    assert tuned.count().trainable == 50
    vector = tuned.table["intrinsic_said.said_v"].tensor
    assert len(vector) == (50 - tensors if layer_scales else 50)
    zoo.randomise(tuned)
    folded = pg.fold(tuned)
    name = "stack.0.fc.weight"
    base_fc, folded_fc = (one.table[name].tensor for one in (base, folded))
    drawn = draw_fastfood(4, name, base_fc.numel(), len(vector), CPU)
    parts = type(drawn)(drawn.signs.to(F64), drawn.order, drawn.normal.to(F64), drawn.hadamard.to(F64), drawn.divisor)
    scale = tuned.table["stack.0.fc.said_l"].tensor if layer_scales else 1.0
    g = fastfood(run, vector.detach(), len(vector), base_fc.numel(), parts).view_as(base_fc) * scale
    assert float((folded_fc - base_fc - g).detach().abs().max()) < 1e-12
    stored = safetensors.torch.load_file(str(next(tuned.save_adapter(tmp_path / "a").glob("*.safetensors"))))
    assert sum(value.numel() for value in stored.values()) == 50  # the random parts are drawn again
    inputs = zoo.example("nano")
    pairs = zip(
        *(zoo.leaves(one.module().eval()(**inputs)) for one in (base.load_adapter(tmp_path / "a"), tuned)), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_more_tensors_than_dimensions_are_refused() -> None:
    with pytest.raises(pg.RecipeError, match="dimension=30 must be larger than the number of tensors, 30"):
        zoo.traced("nano").apply(IntrinsicSAID(dimension=30))
    assert zoo.traced("nano").apply(IntrinsicSAID(dimension=30, layer_scales=False)).count().trainable == 30


SIGNS = [-1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0]
ORDER = [0, 5, 6, 4, 7, 1, 2, 3]
NORMAL = [
    1.9272334575653076,
    0.4691533148288727,
    2.622204065322876,
    -1.3150475025177002,
    0.7835532426834106,
    -0.8951890468597412,
    -0.9532963037490845,
    0.35853713750839233,
]
