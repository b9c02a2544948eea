"""What `docs/tutorials/coming-from-adapters.md` says of the library's compositions and merges, beside recorded outputs.

`record_adapter_directories.py` wrote them: BERT with the directories of `test_adapter_directories.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recorded_models import TOLERANCE, answer, distance, recorded, traced
from torch import Tensor

import peftgraph as pg
from peftgraph.passes import AdapterDrop, Houlsby, Prefix

DIRECTORIES = Path(__file__).parent / "adapter_directories"
NEAR = TOLERANCE["bert"]


def load(method: str, name: str | None = None, program: pg.Program | None = None) -> pg.Program:
    return (program or traced("bert")).load_adapter(DIRECTORIES / f"bert.{method}", name)


def apart(ours: pg.Program, key: str) -> float:
    return distance(answer(ours, "bert"), theirs(key))


def theirs(key: str) -> Tensor:
    return recorded("bert.compositions")[key]


def test_serial_adapters_are_stacked_by_applying_them_in_order() -> None:
    """The library has made the Compacter in float32."""
    assert apart(load("compacter_unshared", program=load("houlsby")), "stack") < 1e-6
    assert apart(load("houlsby", program=load("compacter_unshared")), "stack") > 1e-2


def test_skipped_layers_are_those_of_adapter_drop() -> None:
    adapter = Houlsby(width=4, activation="silu", norms=False)
    whole, dropped = load("houlsby"), traced("bert").apply(AdapterDrop(adapter=adapter, layers=1))
    values = {name.replace("houlsby", "adapter_drop"): entry.tensor for name, entry in whole.table.items()}
    with torch.no_grad():
        for name, parameter in dropped.table.trainable.items():
            parameter.copy_(values[name])
    assert apart(dropped, "skip") < NEAR


def test_a_stack_of_loras_feeds_what_one_gives_to_the_next() -> None:
    """s B A (s B A x), which is the LoRA of A and s B A B; here each reads what its projection reads."""
    assert apart(load("lora_qv", "two", load("lora_qv", "one")), "two_loras") > 1e-2
    fed = load("lora_qv")
    with torch.no_grad():
        for name, parameter in fed.table.trainable.items():
            if name.endswith("lora_B"):
                a_RD = fed.table[name.replace("lora_B", "lora_A")].tensor
                parameter.copy_(3.0 * parameter @ a_RD @ parameter)
    assert apart(fed, "two_loras") < NEAR


def test_of_stacked_parallel_adapters_the_last_alone_is_heard() -> None:
    assert apart(load("parallel_learned"), "two_parallels") < NEAR
    assert apart(load("parallel_learned", "two", load("parallel", "one")), "two_parallels") > 1e-2


def test_stacked_prefixes_are_one_that_is_longer() -> None:
    one, longer = load("prefix"), traced("bert").apply(Prefix(length=6, hidden=None))
    with torch.no_grad():
        for name, parameter in longer.table.trainable.items():
            parameter.copy_(one.table[name].tensor.repeat(2, 1))
    assert apart(longer, "two_prefixes") < NEAR
    with pytest.raises(pg.Conflict, match="Apply one of them"):
        load("prefix", "two", load("prefix", "one"))


def test_merging_lora_is_folding_it() -> None:
    assert apart(pg.fold(load("lora")), "merged_lora") < NEAR


def test_merging_ia3_leaves_the_biases_unscaled_there() -> None:
    with pytest.warns(UserWarning, match=r"no ffn\.hidden"):
        loaded = load("ia3")
    assert distance(answer(pg.fold(loaded), "bert"), answer(loaded, "bert")) < NEAR
    assert apart(loaded, "merged_ia3") > 1e-2
