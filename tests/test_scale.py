"""Linear in depth, by counting executed lines rather than seconds; and a wide model that costs no memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftgraph as pg
from peftgraph.folding.engine import Folding
from peftgraph.passes import LoRA
from peftgraph.sites import find_sites

PACKAGE = str(Path(pg.__file__).parent)
SHALLOW, DEEP = 8, 48
RATIO = 6.3  # six times the depth; the rest is for what is done once


class Block(nn.Module):
    """Pre-norm attention of one head (written out, so that the softmax is matched) and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(6), nn.LayerNorm(6)
        self.qkv, self.o = nn.Linear(6, 18), nn.Linear(6, 6)
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x_BSD)).chunk(3, -1)
        x_BSD = x_BSD + self.o(torch.softmax(q @ k.mT, -1) @ v)
        h_BSD = self.between(x_BSD)
        return x_BSD + self.down(torch.relu(self.gate(h_BSD)) * self.up(h_BSD))


@cache
def tower(layers: int) -> pg.Program:
    torch.manual_seed(0)
    return pg.trace(nn.Sequential(*(Block() for _ in range(layers))), (torch.randn(2, 5, 6),))


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of the package are executed by `work`; each turn of a loop or comprehension counts."""
    count = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return local

    def every(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(every)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def everywhere(program: pg.Program) -> pg.Program:
    return program.apply(LoRA(at="attention.*|ffn.*", rank=2))


WORK: dict[str, Callable[[pg.Program], object]] = {
    "sites": lambda program: find_sites(program.graph, program.table.tensors()),
    "apply": everywhere,
    "text": lambda program: program.text(),
    "count": lambda program: program.count(),
    "remove": lambda program: program.remove(),
    "fold": lambda program: Folding(program, program.sites).run().result(program),
    "proof": lambda program: pg.fold(program, prove="regions"),
}


@pytest.mark.parametrize("work", WORK)
def test_six_times_the_depth_is_at_most_six_times_the_work(work: str) -> None:
    shallow, deep = tower(SHALLOW), tower(DEEP)
    if work in ("count", "remove", "fold", "proof"):
        shallow, deep = everywhere(shallow), everywhere(deep)
    few, many = (lines_of(lambda program=program: WORK[work](program)) for program in (shallow, deep))
    assert many <= RATIO * few
    assert many > 3 * few  # it did look at every layer


def test_the_counter_sees_work_that_is_quadratic() -> None:
    """The twin: for every site a look at all sites."""

    def look_everywhere(program: pg.Program) -> None:
        for _ in program.sites:
            program.sites.select("attention.q")

    few, many = (lines_of(lambda layers=layers: look_everywhere(tower(layers))) for layers in (SHALLOW, DEEP))
    assert many > 3 * RATIO * few


def test_a_model_as_wide_as_gpt_3_is_traced_and_rewritten_without_its_weights() -> None:
    config = GPT2Config(n_layer=4, n_embd=12288, n_head=96, vocab_size=50257, n_positions=2048)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    program = pg.trace(model, {"input_ids": torch.randint(0, 50257, (2, 7))})
    tuned = program.apply(LoRA(at="attention.q|attention.v", rank=8))
    assert {entry.tensor.device.type for entry in tuned.table.values() if entry.kind == "parameter"} == {"meta"}
    assert len(program.sites.select("attention.q")) == 4
    # q and v of 4 layers, each A (8, 12288) and B (12288, 8)
    assert tuned.count().trainable == 4 * 2 * 2 * 8 * 12288
