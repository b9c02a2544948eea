"""Laws that speak of more than one program: passes that commute or do not, and both ways to write attention."""

from __future__ import annotations

from pathlib import Path

import laws
import pytest
import torch
import zoo

import peftgraph as pg
from peftgraph import passes
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, LoRA, SerialAdapter
from peftgraph.testing.laws import LAWS
from peftgraph.testing.subject import outputs

F64 = torch.float64


def test_every_architecture_and_every_pass_has_its_laws() -> None:
    files = [(Path(__file__).parent / f"test_{file}.py").read_text() for file in ("encoders", "decoders", "seq2seq")]
    assert all("".join(files).count(f'"{name}"') == 1 for name in zoo.ALL)
    held = {type(one) for line in laws.LINES.values() for one in line.passes}
    assert held == {one for one in vars(passes).values() if isinstance(one, type) and issubclass(one, Pass)}


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("key", laws.LINES)
def test_identity_where_attention_is_written_out(name: str, key: str) -> None:
    base, line = laws.base_of(name, "eager"), laws.LINES[key]
    if laws.holds_on(line, name) and line.refusal(name) is None:
        LAWS["identity"](laws.subject_of(base, line))


NANO = [key for name, key in laws.cases("nano") if laws.LINES[key].refusal(name) is None]
# no number for each example weighs a change of the weight itself, or of what is no sequence of features
UNGATED = ("diff_pruning", "said", "tokens", "lora+tokens", "quantise+lora", "invertible", "prompt", "prompt_behind",
           "ptuning", "zero_init_prefix")  # fmt: skip


@pytest.mark.parametrize("key", NANO)
def test_determinism_and_gates(key: str) -> None:
    subject = laws.subject_of(laws.base_of("nano"), laws.LINES[key])
    assert LAWS["determinism"](subject)
    assert LAWS["gates"](subject) == (key not in UNGATED)


@pytest.mark.parametrize("name", zoo.ALL)
def test_passes_on_disjoint_sites_commute(name: str) -> None:
    base = laws.base_of(name)
    first, second, third = LoRA(at="attention.o", rank=2), IA3(), SerialAdapter(width=3)
    results, lines = [], []
    for order in ((first, second, third), (third, second, first), (second, third, first)):
        program = base.program.apply(*order)
        with torch.no_grad():
            for key, value in sorted(program.table.trainable.items()):
                value.copy_(torch.linspace(-0.3, 0.4, value.numel(), dtype=F64).view_as(value) + len(key) / 100)
        results.append(outputs(program, base.inputs))
        lines.append(sorted(program.text().splitlines()))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert lines[0] == lines[1] == lines[2]


def test_passes_on_one_site_do_not_commute() -> None:
    base = laws.base_of("bert").program
    both = (LoRA(at="attention.k", rank=2), IA3(at="attention.k"))
    texts = {base.apply(*order).text() for order in (both, both[::-1])}
    assert len(texts) == 2


@pytest.mark.parametrize("key", laws.LINES)
def test_specs_round_trip(key: str) -> None:
    method = pg.Pipeline(laws.LINES[key].passes)
    again = pg.parse_pass(str(method))
    assert again.passes() == method.passes()
    assert str(again) == str(method.passes()[0]) if len(method.passes()) == 1 else str(again) == str(method)
