"""The adapter family beside the `adapters` library: equal bases and adapter weights give its outputs and gradients.

`record_adapters.py` wrote what the library computes. Its models come from an older release of transformers, so the
first test shows that the bases themselves agree. Norms (Llama, T5) and softmaxes (ViT) that compute in float32 limit
agreement to its precision, and to how a processor rounds.
"""

from __future__ import annotations

import re
from dataclasses import replace

import attended
import distances
import pytest
import torch
from recorded import FOLDER, LAYERS, MODELS, WIDTH
from recorded_models import TOLERANCE, answer, build, distance, part, recorded, traced
from torch import Tensor

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import (
    MAM,
    AdapterFusion,
    Compacter,
    CompacterPP,
    Houlsby,
    LoRA,
    LoReFT,
    ParallelAdapter,
    Pfeiffer,
    Prefix,
    Prompt,
    UniPELT,
)

METHODS: dict[str, Pass] = {
    "houlsby": Houlsby(width=4, activation="silu", norms=False),
    "fusion": AdapterFusion(adapters=("one", "two"), width=4),
    "pfeiffer": Pfeiffer(width=4),
    "pfeiffer_attention": Pfeiffer(at=pg.attention & pg.kind("self"), width=4),
    "parallel": ParallelAdapter(width=4, input="residual"),
    "parallel_learned": ParallelAdapter(width=4, input="residual", scale=1.0, learned=True),
    "compacter": Compacter(width=4, n=2, activation="gelu", place="after_dropout", norms=False),
    "compacter_pp": CompacterPP(width=4, n=2, activation="gelu", place="residual_sum", norms=False),
    "loreft": LoReFT(rank=2, prefix=2, suffix=1, tied=False).finalized(),
    "noreft": LoReFT(rank=2, prefix=1, suffix=2, orthogonal=False),
    "direft": LoReFT(rank=2, prefix=2, suffix=1, tied=False, orthogonal=False, subtract=False, activation="gelu"),
    "prefix": Prefix(length=3, hidden=None),
    "prefix_mlp": Prefix(length=3, hidden=6),
    "mam": MAM(length=3, hidden=None, width=4, input="residual"),
    "unipelt": UniPELT(
        methods=(LoRA(rank=2, alpha=2.0), Prefix(length=3, hidden=None), Pfeiffer(width=4)), gates="site"
    ),
}
PREFIXED = ("prefix", "prefix_mlp", "mam", "unipelt")
RECORDED = [
    (method, name) for method in METHODS for name in MODELS if (FOLDER / f"{name}.{method}.safetensors").exists()
]


def configured(method: str, name: str) -> Pass:
    """Our pass; of T5, with the biases that the library has beside a prefix, and edits of the first tokens alone, for
    it cannot find the last ones of the decoder."""
    if name != "t5":
        return METHODS[method]
    if method == "loreft":
        return LoReFT(rank=2, prefix=2, suffix=0).finalized()
    return shifted(METHODS[method])


def shifted(method: Pass) -> Pass:
    """A pass whose prefixes have biases="shifted"."""
    match method:
        case Prefix():
            return replace(method, biases="shifted")
        case UniPELT():
            return replace(method, methods=tuple(map(shifted, method.methods)))
        case MAM():
            return pg.Pipeline(map(shifted, method.passes()))
        case _:
            return method


def short_names(program: pg.Program) -> dict[str, str]:
    """Our parameters by the names of the recording: `{layer}.{site}.{parameter}`, and what sites share by its own."""
    sites = {site.id: site for site in program.sites}
    found: dict[str, str] = {}
    for edit in program.edits:
        site = sites[edit.site]
        assert site.layer is not None
        layer = site.layer + (LAYERS if site.stack == "decoder" else 0)
        cross = "cross." if site.kind == "cross" else ""
        shared = f"{program.history[edit.application].method.word}."
        for name in edit.parameters:
            leaf = re.sub(r"^(lora|prefix|pfeiffer)_(?=gate_)", "", name.rpartition(".")[2])
            found[leaf if name.startswith(shared) else f"{layer}.{cross}{site.role}.{leaf}"] = name
    return found


def with_values(name: str, method: Pass, values: dict[str, Tensor]) -> tuple[pg.Program, dict[str, Tensor]]:
    """The program after `method`, with the library's values, and its parameters by the recording's names."""
    tuned = traced(name).apply(method)
    named = {short: tuned.table[full].tensor for short, full in short_names(tuned).items()}
    assert named.keys() == values.keys()
    with torch.no_grad():
        for key, parameter in named.items():
            assert parameter.shape == values[key].shape
            parameter.copy_(values[key])
    return tuned, named


@pytest.mark.parametrize("name", MODELS)
def test_the_bases_agree(name: str) -> None:
    assert distance(answer(traced(name), name), recorded(name)["output"]) < TOLERANCE[name]


@pytest.mark.parametrize(("method", "name"), RECORDED)
def test_outputs_and_gradients_are_the_librarys(method: str, name: str) -> None:
    stem = f"{name}.{method}"
    tuned, named = with_values(name, configured(method, name), part(stem, "adapter/"))
    output = answer(tuned, name)
    theirs = recorded(stem)["output"]
    assert distance(theirs, recorded(name)["output"]) > 1e-2, "the adapter does nothing"
    assert distance(output, theirs) < TOLERANCE[name]
    (output - recorded(name)["target"]).square().sum().backward()
    gradients = part(stem, "gradient/")
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, parameter in named.items():
        if not parameter.requires_grad:  # the adapters that a fusion mixes are frozen here; the recording moved them
            assert method == "fusion"
            continue
        assert parameter.grad is not None, key
        assert float((parameter.grad - gradients[key]).abs().max()) < 10 * TOLERANCE[name] * largest, key


# where the library leaves the papers


@pytest.mark.parametrize("name", MODELS)
def test_a_parallel_adapter_reads_the_residual_stream_where_the_paper_reads_the_norm(name: str) -> None:
    stem = f"{name}.parallel"
    tuned, _ = with_values(name, ParallelAdapter(width=4), part(stem, "adapter/"))
    apart = distance(answer(tuned, name), recorded(stem)["output"])
    if name == "bert":  # a post-norm block: what the sublayer reads is the residual stream
        assert apart < TOLERANCE[name]
    else:
        assert apart > 1e-2


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("method", ["houlsby", "compacter"])
def test_norms_stay_frozen_where_the_papers_train_them(name: str, method: str) -> None:
    theirs = sum(value.numel() for value in part(f"{name}.{method}", "adapter/").values())
    paper = Houlsby(width=4) if method == "houlsby" else Compacter(width=4, n=2)
    norms = {site.scale: 1 + (site.bias is not None) for site in traced(name).sites.select("norm")}
    assert traced(name).apply(paper).count().trainable == theirs + WIDTH * sum(norms.values())


@pytest.mark.parametrize("method", ["houlsby", "compacter"])
def test_their_activations_are_not_the_papers(method: str) -> None:
    values = part(f"bert.{method}", "adapter/")
    default = Houlsby(width=4, norms=False) if method == "houlsby" else Compacter(width=4, n=2, norms=False)
    tuned, _ = with_values("bert", default, values)
    assert distance(answer(tuned, "bert"), recorded(f"bert.{method}")["output"]) > 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_its_compacter_pp_stands_on_the_residual_sum(name: str) -> None:
    method = CompacterPP(width=4, n=2, activation="gelu", norms=False)
    tuned, _ = with_values(name, method, part(f"{name}.compacter_pp", "adapter/"))
    assert distance(answer(tuned, name), recorded(f"{name}.compacter_pp")["output"]) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_orthonormal_rows_stay_as_they_are(name: str) -> None:
    """R as the library has it, given as the free matrix whose rows LoReFT makes orthonormal."""
    stem = f"{name}.loreft"
    values = {key.replace("projection", "directions"): value for key, value in part(stem, "adapter/").items()}
    tuned, _ = with_values(name, replace(configured("loreft", name), orthogonal=True), values)
    assert distance(answer(tuned, name), recorded(stem)["output"]) < TOLERANCE[name]


@pytest.mark.parametrize("method", PREFIXED)
def test_its_t5_counts_the_prefix_among_the_positions(method: str) -> None:
    """Keys are counted from the prefix on and queries are not, so that tokens have other biases than it was trained
    with."""
    stem = f"t5.{method}"
    tuned, _ = with_values("t5", METHODS[method], part(stem, "adapter/"))
    assert distance(answer(tuned, "t5"), recorded(stem)["output"]) > 1e-2


def test_the_biases_of_its_t5_beside_a_prefix_written_out() -> None:
    """b(j - i) for query i and key j of [P_K; K], in the original model; none in cross-attention."""
    model, inputs, values = build("t5"), part("t5", "input/"), part("t5.prefix", "adapter/")
    model.set_attn_implementation("sdpa")
    places = {name.removesuffix("prefix_k") for name in values if name.endswith("prefix_k")}
    order = sorted(places, key=lambda place: (int(place.partition(".")[0]), "cross" in place))
    rows = [(values[f"{place}prefix_k"], values[f"{place}prefix_v"]) for place in order]
    assert len(rows) == 3 * LAYERS
    with attended.attending(distances.with_counted, distances.counted(model, rows, inputs)):
        written = model(**inputs)["last_hidden_state"]
    assert distance(written, recorded("t5.prefix")["output"]) < TOLERANCE["t5"]


def test_its_prompts_stand_behind_the_norm_of_the_embeddings() -> None:
    """Prompt tuning puts rows in front of the embedded tokens; the library's have no position, no type and no norm."""
    prompt, theirs = part("bert.prompt", "adapter/")["embedding.prompt"], recorded("bert.prompt")["output"]
    model, inputs = build("bert"), part("bert", "input/")
    rows = prompt.expand(2, -1, -1)
    mask = torch.cat([torch.ones(2, len(prompt), dtype=torch.long), inputs["attention_mask"]], 1)
    hidden = torch.cat([rows, model.get_submodule("embeddings")(inputs["input_ids"])], 1)
    open_or_not = (1.0 - mask[:, None, None].double()) * torch.finfo(torch.float64).min
    written = model.get_submodule("encoder")(hidden, attention_mask=open_or_not).last_hidden_state
    assert distance(written, theirs) < TOLERANCE["bert"]
    tuned = traced("bert").apply(Prompt(length=len(prompt), returns="all"))
    with torch.no_grad():
        next(iter(tuned.table.trainable.values())).copy_(prompt)
    assert distance(answer(tuned, "bert"), theirs) > 1e-2
