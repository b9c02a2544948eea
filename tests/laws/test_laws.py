"""The laws, for every pass on every architecture, in float64 on non-square random models with randomised parameters."""

from __future__ import annotations

import pytest
import torch
import truth
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.passes import (
    CIAT,
    IA3,
    AdapterDrop,
    BitFit,
    Compacter,
    DoRA,
    Freeze,
    Houlsby,
    LoRA,
    ParallelAdapter,
    Pfeiffer,
    Prefix,
    SerialAdapter,
)

F64 = torch.float64
PASSES: dict[str, tuple[pg.Pass, ...]] = {
    "lora": (LoRA(rank=3),),
    "lora_all": (LoRA(at="attention.*|ffn.*", rank=2, alpha=5.0),),
    "lora_stable": (LoRA(at="attention.k|ffn.down", rank=4, alpha=5.0, rank_stabilised=True, weight=-0.5),),
    "pissa": (LoRA(at="attention.*|ffn.*", rank=2, alpha=5.0, init="pissa"),),
    "dora": (DoRA(rank=3, alpha=5.0),),
    "dora_all+ia3": (DoRA(at="attention.*|ffn.*", rank=2), IA3()),
    "ia3": (IA3(),),
    "bitfit": (BitFit(),),
    "bitfit_zero": (BitFit(at="attention.*|ffn.*|norm", zero=True, norms=True),),
    "freeze": (Freeze(at="attention.*|ffn.*|norm"),),
    "serial": (SerialAdapter(width=3),),
    "lora+ia3": (LoRA(at="attention.*|ffn.*", rank=2), IA3()),
    "ia3+lora": (IA3(), LoRA(at="attention.*|ffn.*", rank=2)),
    "serial+lora": (SerialAdapter(width=3), LoRA(at="attention.*", rank=2)),
    "houlsby": (Houlsby(width=3),),
    "pfeiffer": (Pfeiffer(width=3),),
    "parallel": (ParallelAdapter(width=3, learned=True),),
    "compacter": (Compacter(width=4),),
    "drop+ciat": (AdapterDrop(adapter=Pfeiffer(width=3), random=True), CIAT(width=3, init="identity")),
    "prefix+lora": (Prefix(length=3, hidden=5), LoRA(rank=2)),
}
ADAPTERS = ("serial", "serial+lora", "houlsby", "pfeiffer", "parallel", "compacter", "drop+ciat")
AWAY = ("prefix+lora",)  # these do not start at the identity, by definition
ELSEWHERE = ("drop+ciat", *AWAY)  # what has its eager reference in tests/methods
# These start near the identity and not on it: what they draw is the identity once these parameters are zero.
NEAR = {"houlsby": "up_weight", "pfeiffer": "up_weight", "compacter": "up_right", "drop+ciat": "up_weight"}
BIASED = ("bert", "gpt2", "gpt_neox", "vit", "nano")
CASES = [(name, case) for name in zoo.NAMES for case in PASSES if case != "bitfit" or name in BIASED]
# A bias where the model has none is not in its weights: it neither folds nor stands in a reference made of weights.
ADDED = [(name, "bitfit_zero") for name in zoo.NAMES if name not in BIASED]
FOLDABLE = [(name, case) for name, case in CASES if case not in ADAPTERS + AWAY and (name, case) not in ADDED]


def tuned(name: str, case: str, attn: str = "sdpa") -> pg.Program:
    return zoo.traced(name, attn, F64).apply(*PASSES[case])


def outputs(program: pg.Program, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return zoo.leaves(program.module().eval()(**inputs))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float(((x - y).abs().max() / x.abs().max()).detach()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("attn", zoo.ATTENTIONS)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_identity_at_the_start(name: str, case: str, attn: str) -> None:
    inputs = zoo.example(name, 2, 9, F64)
    base, fresh = outputs(zoo.traced(name, attn, F64), inputs), tuned(name, case, attn)
    if case in AWAY:
        assert distance(base, outputs(fresh, inputs)) > 1e-4
        return
    if case in NEAR:
        assert 0 < distance(base, outputs(fresh, inputs)) < 0.1
        with torch.no_grad():
            for parameter in (p for key, p in fresh.table.trainable.items() if key.endswith(NEAR[case])):
                parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(base, outputs(fresh, inputs), strict=True))
    moved = outputs(zoo.randomise(fresh), inputs)
    assert not any(torch.equal(a, b) for a, b in zip(base[:1], moved[:1], strict=True)), "the pass does nothing"


@pytest.mark.parametrize(("name", "case"), FOLDABLE)
def test_fold_agrees(name: str, case: str) -> None:
    program = zoo.randomise(tuned(name, case))
    folded = pg.fold(program)
    inputs = zoo.example(name, 2, 9, F64)
    assert distance(outputs(program, inputs), outputs(folded, inputs)) < 1e-12
    assert folded.text() == zoo.traced(name, "sdpa", F64).text()
    assert folded.count().trainable == folded.count().added == 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_unfoldable_is_refused_site_by_site(name: str) -> None:
    program = tuned(name, "serial+lora")
    with pytest.raises(pg.NoFold, match="nonlinearity stands between") as error:
        pg.fold(program)
    sublayers = zoo.traced(name, "sdpa", F64).sites.select("attention|ffn")
    assert [reason.split(":")[0] for reason in error.value.reasons] == [site.id for site in sublayers]
    rest = pg.fold(program, partial=True)
    assert [applied.method.word for applied in rest.history] == ["serial_adapter"]


@pytest.mark.parametrize(("name", "case"), [one for one in CASES if one[1] not in ELSEWHERE and one not in ADDED])
def test_gradients_equal_an_eager_reference(name: str, case: str) -> None:
    """Those left out have their references in tests/methods."""
    program = zoo.randomise(tuned(name, case))
    inputs = zoo.example(name, 2, 9, F64)
    net = program.module().eval()
    parameters = {key: value for key, value in net.named_parameters() if value.requires_grad}
    assert parameters.keys() == program.table.trainable.keys()
    ours = zoo.leaves(net(**inputs))
    grads = torch.autograd.grad(sum(out.square().sum() for out in ours), list(parameters.values()))
    low = next((part for part in PASSES[case] if isinstance(part, LoRA | DoRA)), None)
    alpha = 1.0 if low is None else low.scale * low.rank * (low.weight if isinstance(low, LoRA) else 1.0)
    added = parameters | {key: entry.tensor for key, entry in program.table.items() if entry.added}
    theirs = truth.eager_outputs(name, truth.eager_model(name, F64), added, inputs, alpha, case == "ia3+lora")
    wanted = torch.autograd.grad(sum(out.square().sum() for out in theirs), list(parameters.values()))
    assert distance(theirs, ours) < 1e-12
    scale = max(float(grad.abs().max()) for grad in wanted)
    for key, got, want in zip(parameters, grads, wanted, strict=True):
        assert float((got - want).abs().max()) < 1e-11 * scale, key
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_removing_restores_the_text(name: str, case: str) -> None:
    base, program = zoo.traced(name, "sdpa", F64), tuned(name, case)
    if case not in ("bitfit", "freeze"):
        assert program.text() != base.text()
    while program.history:
        program = program.remove(0)
    assert program.text() == base.text()
    assert program.table.hashes() == base.table.hashes()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_passes_on_disjoint_sites_commute(name: str) -> None:
    base = zoo.traced(name, "sdpa", F64)
    first, second, third = LoRA(at="attention.o", rank=2), IA3(), SerialAdapter(width=3)
    inputs = zoo.example(name, 2, 9, F64)
    results, lines = [], []
    for order in ((first, second, third), (third, second, first), (second, third, first)):
        program = base.apply(*order)
        with torch.no_grad():
            for key, value in sorted(program.table.trainable.items()):
                value.copy_(torch.linspace(-0.3, 0.4, value.numel(), dtype=F64).view_as(value) + len(key) / 100)
        results.append(outputs(program, inputs))
        lines.append(sorted(program.text().splitlines()))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert lines[0] == lines[1] == lines[2]


def test_passes_on_one_site_do_not_commute() -> None:
    base = zoo.traced("bert", "sdpa", F64)
    passes = (LoRA(at="attention.k", rank=2), IA3(at="attention.k"))
    texts = {base.apply(*order).text() for order in (passes, passes[::-1])}
    assert len(texts) == 2


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_input_program_is_unchanged(name: str, case: str) -> None:
    base = zoo.traced(name, "sdpa", F64)
    text, hashes = base.text(), base.table.hashes()
    program = tuned(name, case)
    net = program.module()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    sum(out.square().mean() for out in zoo.leaves(net(**zoo.example(name, 2, 5, F64)))).backward()
    optimizer.step()
    trained = program.table.hashes()
    pg.fold(program, partial=True)
    assert (base.text(), base.table.hashes()) == (text, hashes)
    assert program.table.hashes() == trained
    assert trained.items() - hashes.items(), "training moved nothing"


@pytest.mark.parametrize(("name", "case"), CASES)
def test_save_and_load_is_bit_exact(name: str, case: str, tmp_path) -> None:
    base = zoo.traced(name, "sdpa", F64)
    program = zoo.randomise(tuned(name, case))
    loaded = base.load_adapter(program.save_adapter(tmp_path / "adapter"))
    assert loaded.text() == program.text()
    assert loaded.table.hashes() == program.table.hashes()
    with torch.no_grad():
        next(iter(loaded.table.trainable.values())).add_(1e-9)
    assert loaded.table.hashes() != program.table.hashes()


@pytest.mark.parametrize("case", PASSES)
def test_specs_round_trip(case: str) -> None:
    method = pg.Pipeline(PASSES[case])
    again = pg.parse_pass(str(method))
    assert again.passes() == method.passes()
    assert str(again) == str(method.passes()[0]) if len(method.passes()) == 1 else str(again) == str(method)
