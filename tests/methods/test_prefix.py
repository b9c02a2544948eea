"""Prefix tuning against its equation inside the original models, with padding, and after training."""

from __future__ import annotations

import inspect
from typing import Any

import attended
import pytest
import torch
import truth
import zoo
from torch import Tensor, nn
from transformers import DynamicCache

import peftgraph as pg
from peftgraph.passes import LoRA, Prefix

F64 = torch.float64
CASES = [(name, hidden) for name in zoo.NAMES for hidden in (None, 5)] + [("falcon", None), ("deberta", 5)]


def tuned(name: str, attn: str = "sdpa", hidden: int | None = None, length: int = 3) -> pg.Program:
    torch.manual_seed(1)
    return zoo.randomise(zoo.traced(name, attn, F64).apply(Prefix(length=length, hidden=hidden)), 0.5)


def rows(program: pg.Program) -> list[attended.Rows]:
    """P_K and P_V of every attention in the order of the graph, computed from the parameters."""
    table = program.table.trainable
    found: list[attended.Rows] = []
    for site in program.sites.select("attention.core"):
        edit = next(edit for edit in program.edits if edit.site == site.id)
        own = {name.rpartition(".")[2]: table[name] for name in edit.parameters}
        if "prefix_k" in own:
            found.append((own["prefix_k"], own["prefix_v"]))
            continue
        family = "_".join(part for part in (site.stack, site.kind) if part)
        ends = ("embedding", "down_weight", "down_bias")
        start, weight, bias = (table[f"prefix.{family}_{end}"] for end in ends)
        hidden = torch.tanh(start @ weight.T + bias)
        key, value = (hidden @ own[f"{one}_weight"].T + own[f"{one}_bias"] for one in "kv")
        found.append((key, value))
    return found


def answer(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return zoo.leaves(module(**inputs))[0]


@pytest.mark.parametrize(("name", "hidden"), CASES)
def test_outputs_and_gradients_are_the_equation_s(name: str, hidden: int | None) -> None:
    program = tuned(name, hidden=hidden)
    inputs = zoo.example(name, 2, 9, F64)
    ours = answer(program.module().eval(), inputs)
    written = name == "deberta"
    own = rows(program)
    with attended.disentangled(own, zoo.HEADS) if written else attended.attending(attended.with_prefix, own):
        theirs = answer(truth.eager_model(name, F64), inputs)
    assert float((ours - theirs).detach().abs().max()) < 1e-12 * float(theirs.detach().abs().max())
    base = answer(zoo.traced(name, "sdpa", F64).module().eval(), inputs)
    assert float((ours - base).detach().abs().max()) > 1e-3
    parameters = program.table.trainable
    weights = torch.randn_like(theirs)
    grads = [torch.autograd.grad((out * weights).sum(), list(parameters.values())) for out in (ours, theirs)]
    scale = max(float(grad.abs().max()) for grad in grads[1])
    for key, got, want in zip(parameters, *grads, strict=True):
        assert float(want.abs().max()) > 0, key
        assert float((got - want).abs().max()) < 1e-11 * scale, key


@pytest.mark.parametrize("name", zoo.NAMES)
def test_both_ways_to_write_attention_agree(name: str) -> None:
    fused, written = tuned(name), tuned(name, "eager")
    assert fused.table.trainable.keys() == written.table.trainable.keys()
    with torch.no_grad():
        for key, value in written.table.trainable.items():
            value.copy_(fused.table[key].tensor)
    inputs = zoo.example(name, 2, 9, F64)
    a, b = (answer(one.module().eval(), inputs).detach() for one in (fused, written))
    # some models take their softmax in float32
    assert float((a - b).abs().max()) < (1e-12 if name in ("bert", "gpt2", "t5", "nano") else 1e-5)


@pytest.mark.parametrize("attn", zoo.ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gpt_neox", "t5", "mixtral"])
def test_padding_changes_no_answer(name: str, side: str, attn: str) -> None:
    program = zoo.randomise(zoo.positioned(name, attn).apply(Prefix(length=3, hidden=None)), 0.5)
    batch, single = zoo.unpadded(program.module().eval(), name, side)
    assert float((batch - single).abs().max()) < 1e-6


@pytest.mark.parametrize("attn", zoo.ATTENTIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_placed_rows_are_seen_as_earlier_tokens(name: str, attn: str) -> None:
    """The model itself with the rows in its cache, through windows that are shorter than the text (Gemma 2)."""
    inputs, model = zoo.example(name, 2, 9, F64), zoo.build(name, attn, F64)
    inputs["attention_mask"][:] = 1
    inputs["position_ids"] = torch.arange(9).expand(2, -1).clone()
    method = Prefix(length=3, hidden=None, placed=True)
    program = zoo.randomise(pg.trace(model, inputs).apply(method), 0.5)
    cache = DynamicCache()
    for layer, pair in enumerate(rows(program)):
        heads = [row.detach().unflatten(-1, (-1, 8)).transpose(0, 1).expand(2, -1, -1, -1) for row in pair]
        cache.update(*heads, layer)
    longer = inputs | {"attention_mask": torch.ones(2, 12, dtype=torch.long)}
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    theirs = answer(model, longer | {word: cache})
    ours = answer(program.module().eval(), inputs)
    tolerance = 1e-12 if name == "gpt2" else 1e-6  # the others turn, or take their softmax, in float32
    assert float((ours - theirs).detach().abs().max()) < tolerance * float(theirs.detach().abs().max())
    open_to_all = program.remove(0).apply(Prefix(length=3, hidden=None))
    with torch.no_grad():
        for key, value in open_to_all.table.trainable.items():
            value.copy_(program.table[key].tensor)
    far = float((answer(open_to_all.module().eval(), inputs) - ours).detach().abs().max())
    assert (far > 1e-3) == (name == "gemma2")


def test_masks_with_more_axes_take_no_rows_with_places() -> None:
    model, inputs = zoo.build("gpt2", dtype=F64), zoo.example("gpt2", 2, 9, F64)
    inputs["attention_mask"] = torch.zeros(2, 1, 9, 9, dtype=F64)
    program = pg.trace(model, inputs)
    with pytest.raises(pg.PeftGraphError, match=r"only inputs \(batch, tokens\) can be made longer"):
        program.apply(Prefix(length=3, placed=True))
    assert len(program.apply(Prefix(length=3)).edits) == 2


def test_biases_that_depend_on_more_than_places_are_refused() -> None:
    with pytest.raises(pg.PeftGraphError, match="depends on .*, a product of the model's own"):
        zoo.traced("deberta").apply(Prefix(length=3, placed=True))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_finalize_keeps_the_outputs_and_drops_the_mlp(name: str, tmp_path) -> None:
    program = zoo.randomise(zoo.traced(name, "sdpa", F64).apply(Prefix(length=3, hidden=5), LoRA(rank=2)))
    before = program.table.hashes()
    final = program.finalize()
    inputs = zoo.example(name, 2, 9, F64)
    assert torch.equal(answer(program.module().eval(), inputs), answer(final.module().eval(), inputs))
    direct = zoo.traced(name, "sdpa", F64).apply(Prefix(length=3, hidden=None), LoRA(rank=2))
    assert final.text() == direct.text()
    assert final.table.trainable.keys() == direct.table.trainable.keys()
    assert program.table.hashes() == before
    loaded = zoo.traced(name, "sdpa", F64).load_adapter(final.save_adapter(tmp_path / "final"))
    assert loaded.table.hashes() == final.table.hashes()
    assert all(p is not final.table[key].tensor for key, p in program.table.trainable.items() if key in final.table)


def test_what_computes_nothing_has_nothing_to_finalise() -> None:
    with pytest.raises(pg.PeftGraphError, match="no pass computes values from its parameters alone"):
        tuned("nano").finalize()


def test_one_mlp_for_each_kind_of_attention() -> None:
    program = zoo.traced("t5").apply(Prefix(length=3, hidden=5))
    shared = {name for name in program.table.trainable if name.startswith("prefix.")}
    families = {name.removeprefix("prefix.").rpartition("_embedding")[0] for name in shared if "embedding" in name}
    assert families == {"encoder_self", "decoder_self", "decoder_cross"}
    assert len(shared) == 9


def test_grouped_heads_have_one_row_a_head_of_keys() -> None:
    shapes = {tuple(p.shape) for p in tuned("llama").table.trainable.values()}
    assert shapes == {(3, 2 * 8)}


def test_options_are_checked() -> None:
    for options, words in (
        ({"length": 0}, "length must"),
        ({"hidden": 0}, "hidden must"),
        ({"dropout": 1.0}, "dropout"),
    ):
        with pytest.raises(pg.RecipeError, match=words):
            Prefix(**options)


def test_only_a_core_has_keys() -> None:
    with pytest.raises(pg.PeftGraphError, match="is no attention core, so it has no keys"):
        zoo.traced("bert").apply(Prefix(at="attention.q"))


def test_one_attention_takes_one_prefix() -> None:
    program = zoo.traced("bert").apply(Prefix())
    with pytest.raises(
        pg.Conflict, match=r'^prefix\{.*name="second"\} and prefix\{.*\} both replace the output of 0\.attention\.core'
    ):
        program.apply(Prefix(name="second"))


class Capped(nn.Module):
    """Attention whose scores go through `change` before the softmax."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = self.change(q @ k.transpose(-2, -1) / 2).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


def test_a_cap_on_the_scores_caps_the_prefix_s_too() -> None:
    torch.manual_seed(0)
    model, x = Capped(lambda s: (s / 3).tanh() * 3).to(F64), torch.randn(2, 5, 12, dtype=F64)
    program = zoo.randomise(pg.trace(model, (x,)).apply(Prefix(length=2, hidden=None)), 1.0)
    key, value = (p.view(2, 3, 4).transpose(0, 1).expand(2, 3, 2, 4) for p in program.table.trainable.values())
    q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (model.q, model.k, model.v))
    scores = q @ torch.cat([key, k], 2).transpose(-2, -1) / 2
    heads = ((scores / 3).tanh() * 3).softmax(-1) @ torch.cat([value, v], 2)
    wanted = x + model.o(heads.transpose(1, 2).flatten(2))
    assert float((program.module()(x) - wanted).detach().abs().max()) < 1e-12


def test_scores_changed_key_by_key_are_refused() -> None:
    model = Capped(lambda s: s * torch.linspace(0.5, 1.0, s.shape[-1]))
    with pytest.raises(pg.PeftGraphError, match="past which no rows of keys and values can be led"):
        pg.trace(model, (torch.randn(2, 5, 12),)).apply(Prefix())
