"""Statistics of data at sites beside hooks on the model, what is asked for, and starts that are computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.authoring.training import Statistic
from peftgraph.passes import IA3, LoRA

EVA = LoRA(at="attention.q|ffn.down", rank=2, init="eva")


@dataclass(frozen=True, kw_only=True)
class Asks(LoRA):
    """A LoRA that asks for everything."""

    word = "asks"
    at: pg.Selector = pg.ffn.down

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({"covariance", "activations", "gradient", "fisher"})


def batches(count: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"idx": torch.randint(3, zoo.VOCAB, (2, 5), generator=generator)} for _ in range(count)]


def loss(output: Mapping[str, Tensor]) -> Tensor:
    return output["logits"].square().mean()


def test_statistics_are_those_of_the_model() -> None:
    base = zoo.traced("nano", dtype=torch.float64)
    found = base.calibrate(batches(), Asks(), loss=loss, samples=7).statistics
    model = zoo.build("nano", dtype=torch.float64).eval()
    layer = model.stack[0].proj  # type: ignore
    seen: list[Tensor] = []
    grads: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, -2)))
    for batch in batches():
        output = model(**batch)
        (grad,) = torch.autograd.grad(loss(output), [layer.weight])
        grads.append(grad)
    x_NI, own = torch.cat(seen), found["0.ffn.down"]
    assert own.rows == len(x_NI) == 30
    assert torch.allclose(own.covariance, x_NI.mT @ x_NI / 30, atol=1e-12)  # type: ignore
    assert torch.allclose(own.gradient, torch.stack(grads).mean(0), atol=1e-12)  # type: ignore
    assert torch.allclose(own.fisher, torch.stack(grads).square().mean(0), atol=1e-12)  # type: ignore
    assert own.activations is not None
    assert own.activations.shape == (7, x_NI.shape[1])
    assert all(bool((x_NI - row).abs().max(1).values.min() < 1e-12) for row in own.activations)
    assert set(found) == {"0.ffn.down", "1.ffn.down"}
    assert all(not p.requires_grad or p.grad is None for p in base.module().parameters())


def test_eva_starts_along_the_largest_inputs_and_is_read_back_without_data(tmp_path: Path) -> None:
    base = zoo.traced("nano", dtype=torch.float64)
    ready = base.calibrate(batches(), EVA)
    tuned = ready.apply(EVA)
    a_RI = tuned.table["stack.1.proj.lora_A"].tensor
    covariance = ready.statistics["1.ffn.down"].covariance
    assert covariance is not None
    assert torch.allclose(a_RI @ a_RI.mT, torch.eye(2, dtype=torch.float64), atol=1e-12)
    values = torch.linalg.eigvalsh(covariance)
    assert torch.allclose((a_RI @ covariance @ a_RI.mT).diagonal(), values.flip(0)[:2], rtol=1e-9)
    x = zoo.example("nano")
    assert torch.equal(zoo.leaves(tuned.module().eval()(**x))[0], zoo.leaves(base.module().eval()(**x))[0])
    zoo.randomise(tuned)
    back = base.load_adapter(tuned.save_adapter(tmp_path / "a"))
    assert back.table.hashes() == tuned.table.hashes()


def test_what_calibration_refuses() -> None:
    base = zoo.traced("nano")
    with pytest.raises(pg.PeftGraphError, match="Calibrate the program first"):
        base.apply(EVA)
    with pytest.raises(pg.PeftGraphError, match="nothing to calibrate"):
        base.calibrate(batches(), IA3())
    with pytest.raises(pg.PeftGraphError, match="no batches"):
        base.calibrate([], EVA)
    with pytest.raises(pg.PeftGraphError, match="The model gives no loss"):
        base.calibrate(batches(), Asks())
    with pytest.raises(pg.PeftGraphError, match="choose plain projections"):
        base.calibrate(batches(), LoRA(at="embedding", rank=2, init="eva"))


def asks(methods: Sequence[Pass]) -> list[frozenset[str]]:
    return [frozenset(one.statistics()) for one in methods]


def test_passes_ask_for_what_they_need() -> None:
    assert asks([LoRA(), EVA, IA3()]) == [frozenset(), frozenset({"covariance"}), frozenset()]
