"""Prompts as values: read, started from, compared and mixed, against loops written out."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch import Tensor

import peftgraph as pg
from peftgraph.passes import LoRA, Prompt, PTuning


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def test_similarity_is_the_cosine_of_means_or_the_mean_of_cosines() -> None:
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert pg.prompts.similarity(a, b) == pytest.approx(cosine(a.mean(0), b.mean(0)), abs=1e-14)
    pairs = [cosine(x, y) for x in a for y in b]
    assert pg.prompts.similarity(a, b, "rows") == pytest.approx(sum(pairs) / 12, abs=1e-14)
    with pytest.raises(pg.PeftGraphError, match="3 x 5 and 4 x 4 cannot be compared"):
        pg.prompts.similarity(a, b[:, :4])


def test_the_nearest_tasks_are_found_and_mixed_by_their_similarities() -> None:
    target = torch.randn(4, 6)
    sources = {"far": -target, "near": target + 0.1 * torch.randn(4, 6), "middle": target + torch.randn(4, 6)}
    ranked = pg.prompts.nearest(target, sources, 3)
    assert [name for name, _ in ranked] == ["near", "middle", "far"]
    (_, one), (_, two), _ = ranked
    wanted = (one * sources["near"] + two * sources["middle"]) / (one + two)
    assert torch.allclose(pg.prompts.blend(target, sources, 2), wanted, atol=1e-6)
    with pytest.raises(pg.PeftGraphError, match="'far' has similarity -1.000"):
        pg.prompts.blend(target, sources, 3)
    with pytest.raises(pg.PeftGraphError, match="between 1 and the 3 sources, got 4"):
        pg.prompts.nearest(target, sources, 4)
    with pytest.raises(pg.PeftGraphError, match="different shapes"):
        pg.prompts.blend(target, {"a": target, "b": target[:2]}, 2)


def test_a_task_starts_from_the_prompt_of_another(tmp_path) -> None:
    base = zoo.traced("nano")
    source = zoo.randomise(base.apply(Prompt(length=3), LoRA(rank=2)))
    source.save_adapter(tmp_path / "source")
    prompt = pg.prompts.prompt_of(base.load_adapter(tmp_path / "source"))
    assert torch.equal(prompt, source.table["tok.prompt"].tensor)
    target = base.apply(Prompt(length=3, name="mine"))
    pg.prompts.start(target, prompt)
    assert torch.equal(target.table["tok.mine.prompt"].tensor, prompt)
    assert torch.equal(pg.prompts.prompt_of(target, "mine"), prompt)
    with pytest.raises(pg.PeftGraphError, match="is 3 x 48, the prompt to start from 2 x 48"):
        pg.prompts.start(target, prompt[:2])
    with pytest.raises(pg.PeftGraphError, match="No pass called 'yours' has a prompt"):
        pg.prompts.prompt_of(target, "yours")
    with pytest.raises(pg.PeftGraphError, match="No pass of this program has a prompt"):
        pg.prompts.prompt_of(base)


def test_an_encoder_gives_a_prompt_too() -> None:
    program = zoo.traced("nano").apply(PTuning(length=3, encoder="mlp", hidden=4))
    prompt = pg.prompts.prompt_of(program)
    final = program.finalize()
    assert torch.equal(prompt, final.table["tok.prompt"].tensor)
    with pytest.raises(pg.PeftGraphError, match=r"An encoder makes the rows of tok.prompt; finalize\(\)"):
        pg.prompts.start(program, prompt)
    pg.prompts.start(final, 2 * prompt)
    assert torch.equal(pg.prompts.prompt_of(final), 2 * prompt)
