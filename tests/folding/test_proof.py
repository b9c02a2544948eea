"""The proof of a fold is blind nowhere: what is not finite is refused by its name, unless the base's own is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Match, ParameterValue, Params
from peftgraph.folding.engine import Folding
from peftgraph.folding.proof import ProofError, prove
from peftgraph.ir.graphs import copy_graph
from peftgraph.passes import LoRA, TrainableTokens

NAN, INF = float("nan"), float("inf")
HIDDEN = torch.tensor([False, True, False, True, False])


class Reader(nn.Module):
    """Tokens to scores: some of which the model hides, and some of which it lets grow without bound."""

    def __init__(self, last: str = "plain") -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 5)
        self.last = last

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.down(torch.relu(self.up(self.table(tokens))))
        if self.last == "hidden":
            return scores.masked_fill(HIDDEN, -INF)
        if self.last == "grows":
            return scores.exp().exp()
        return scores / torch.zeros(5) * 0 if self.last == "never" else scores


def traced(
    last: str = "plain", change: dict[str, float] | None = None, dtype: torch.dtype = torch.float32
) -> pg.Program:
    """A program of a reader, some of whose weights are overwritten in their last row."""
    torch.manual_seed(1)
    model = Reader(last).eval().to(dtype)
    with torch.no_grad():
        for name, value in (change or {}).items():
            model.get_parameter(name)[-1] = value
    return pg.trace(model, (torch.tensor([[1, 2, 3], [4, 5, 6]]),))


def tuned(program: pg.Program, scale: float = 0.1, method: LoRA | None = None) -> pg.Program:
    program = program.apply(method or LoRA(at="projection|head", rank=2))
    with torch.no_grad():
        for parameter in program.table.trainable.values():
            parameter.add_(scale * torch.randn(parameter.shape))
    return program


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_parameter_that_is_not_finite_is_named(value: float) -> None:
    program = tuned(traced())
    program.table["down.lora_B"].tensor.data[3, 1] = value
    with pytest.raises(ProofError, match=r"down.lora_B holds 1 values that are infinite or NaN.*Go back"):
        pg.fold(program)


def test_new_values_that_do_not_fit_the_dtype_are_refused() -> None:
    program = traced(change={"up.weight": 6e4}, dtype=torch.float16)
    assert pg.fold(tuned(program)).proof is not None
    large = tuned(program)
    for part in ("up.lora_A", "up.lora_B"):
        large.table[part].tensor.data.fill_(40.0)
    with pytest.raises(ProofError, match=r"up.weight is finite in the base and would not be .* do not fit float16"):
        pg.fold(large)


@dataclass(frozen=True, kw_only=True)
class Undefined(LoRA):
    """A LoRA whose fold divides 0 by 0 in one place."""

    word = "undefined"

    def fold(self, m: Match, p: Params) -> Mapping[ParameterValue, Tensor]:
        (weight, value), *_ = super().fold(m, p).items()
        hole = torch.zeros_like(value)
        hole[-1, -1] = NAN
        return {weight: value + hole}


def test_a_fold_that_gives_no_numbers_is_refused() -> None:
    with pytest.raises(ProofError, match=r"up.weight is finite in the base and would not be after folding"):
        pg.fold(tuned(traced(), method=Undefined(at="projection", rank=2)))


def test_outputs_that_are_finite_in_the_base_alone_prove_nothing() -> None:
    program = traced("grows")
    assert pg.fold(tuned(program)).proof is not None
    with pytest.raises(ProofError, match=r"Output 0 on 2x3 is infinite or no number where the base's is finite"):
        pg.fold(tuned(program, 20.0))


def test_outputs_that_the_base_hides_too_are_counted() -> None:
    proof = pg.fold(tuned(traced("hidden"))).proof
    assert proof is not None
    assert [probe.unknown for probe in proof.probes] == [12, 12, 6, 6]
    assert "12 outputs are not finite, nor are the base's" in str(proof)
    clean = pg.fold(tuned(traced())).proof
    assert "finite" not in str(clean)


def test_a_model_that_gives_no_numbers_proves_nothing() -> None:
    with pytest.raises(ProofError, match="No output on 2x3 is finite, nor is the base's"):
        pg.fold(tuned(traced("never")))


def test_what_the_base_never_reads_may_be_anything() -> None:
    program = traced(change={"table.weight": NAN})
    folded = pg.fold(tuned(program))
    assert folded.table["table.weight"].tensor.isnan().any()
    rows = pg.fold(tuned(program, method=LoRA(at="embedding", rank=2)))
    assert rows.table["table.weight"].tensor[-1].isnan().all()
    assert not rows.table["table.weight"].tensor[:-1].isnan().any()


def test_rows_beside_what_is_no_number_are_compared_bit_for_bit() -> None:
    program = traced(change={"table.weight": NAN}).apply(TrainableTokens(tokens=[2, 4]))
    with torch.no_grad():
        next(iter(program.table.trainable.values())).fill_(0.5)
    folded = pg.fold(program)
    assert torch.equal(folded.table["table.weight"].tensor[[2, 4]], torch.full((2, 6), 0.5))


def folded_by_rows(program: pg.Program) -> tuple[pg.Program, Folding, pg.Program]:
    """A program that trains two rows of the table and a low-rank path, its fold, and the result."""
    tuned_program = tuned(program.apply(TrainableTokens(tokens=[2, 4])), method=LoRA(at="projection", rank=2))
    folding = Folding(tuned_program, tuned_program.sites).run()
    return tuned_program, folding, folding.result(tuned_program)


def other_operator(folded: pg.Program) -> pg.Program:
    graph = copy_graph(folded.graph)
    relu = next(node for node in graph.nodes if node.target == torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.sigmoid.default
    return folded.evolve(graph=graph)


def changed(name: str, change: Callable[[Tensor], object]) -> Callable[[pg.Program], pg.Program]:
    """What gives a folded program in which one tensor has other values."""

    def tamper(folded: pg.Program) -> pg.Program:
        tensor = folded.table[name].tensor.detach().clone()
        change(tensor)
        return folded.evolve(table=folded.table.with_tensor(name, tensor))

    return tamper


TAMPERED: dict[str, tuple[Callable[[pg.Program], pg.Program], str]] = {
    "text": (other_operator, r"The folded graph is not the base's graph\."),
    "another tensor": (
        changed("down.bias", lambda tensor: None),  # a copy that is equal to the bit is refused as well
        r"down\.bias was not to change, but is another tensor now\.",
    ),
    "outside of the window": (
        changed("table.weight", lambda tensor: tensor[3].add_(1.0)),
        r"table\.weight changed outside of ",
    ),
    "rounding": (
        changed("up.weight", lambda tensor: tensor[0, 0].mul_(1 + 1e-3)),
        r"up\.weight is \d+\.\d epsilon away from the float64 algebra after folding; 8 are allowed\.",
    ),
}


@pytest.fixture(scope="module")
def honest() -> tuple[pg.Program, Folding, pg.Program]:
    return folded_by_rows(traced())


def test_an_honest_fold_is_proved(honest: tuple[pg.Program, Folding, pg.Program]) -> None:
    proof = prove(*honest)
    assert proof.text_equal
    assert set(proof.changed) == {"table.weight", "up.weight"}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_fold_that_was_tampered_with_is_refused(honest: tuple[pg.Program, Folding, pg.Program], kind: str) -> None:
    program, folding, folded = honest
    tamper, words = TAMPERED[kind]
    with pytest.raises(ProofError, match=words):
        prove(program, folding, tamper(folded))
