"""Invertible adapters: the equation on real models, that the inverse inverts, which heads read it, other passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import transformers
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import ACTIVATIONS, Pass
from peftgraph.passes import Invertible, LoRA, Pfeiffer, Prompt, TrainableTokens

F64 = torch.float64
BERT: dict[str, Any] = {"vocab_size": zoo.VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "intermediate_size": 40, "max_position_embeddings": 64}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "Bert": BERT,
    "Albert": BERT | {"embedding_size": 10},
    "GPT2": {"vocab_size": zoo.VOCAB, "n_positions": 64, "n_embd": 21, "n_layer": 2, "n_head": 3},  # of odd width
    "Llama": BERT | {"num_key_value_heads": 2},
    "T5": {"vocab_size": zoo.VOCAB, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4, "num_layers": 2},
}


def build(family: str) -> nn.Module:
    """A small model of transformers in float64; no vector is zero or one."""
    torch.manual_seed(0)
    name = next(one for one in SIZES if family.startswith(one))
    model = getattr(transformers, family)(getattr(transformers, f"{name}Config")(**SIZES[name])).to(F64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def call(family: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return zoo.example("t5" if family.startswith("T5") else "bert", 2, 6)


@cache
def traced(family: str) -> pg.Program:
    return pg.trace(build(family), call("Bert" if family == "T5EncoderModel" else family))


class Coupling(nn.Module):
    """The equations; E is split into E // 2 and the rest."""

    def __init__(self, width: int, reduction: float, act: str) -> None:
        super().__init__()
        self.cut = width // 2
        first, second = self.cut, width - self.cut
        self.f = self.net(second, first, reduction, plain.ACTIVATIONS[act])
        self.g = self.net(first, second, reduction, plain.ACTIVATIONS[act])

    @staticmethod
    def net(inner: int, out: int, reduction: float, act: nn.Module) -> nn.Sequential:
        narrow = int(inner // reduction)
        return nn.Sequential(nn.Linear(inner, narrow), act, nn.Linear(narrow, out)).to(F64)

    def forward(self, e: Tensor) -> Tensor:
        e1, e2 = e[..., : self.cut], e[..., self.cut :]
        o1 = self.f(e2) + e1
        return torch.cat([o1, self.g(o1) + e2], -1)

    def back(self, o: Tensor) -> Tensor:
        o1, o2 = o[..., : self.cut], o[..., self.cut :]
        e2 = o2 - self.g(o1)
        return torch.cat([o1 - self.f(e2), e2], -1)

    def named(self, owner: str = "invertible") -> dict[str, nn.Parameter]:
        """Its parameters by our names."""
        layers = {"down": 0, "up": 2}
        return {f"{owner}.{net}_{end}_{leaf}": getattr(getattr(self, net)[number], leaf)
                for net in "fg" for end, number in layers.items() for leaf in ("weight", "bias")}  # fmt: skip


def as_coupling(program: pg.Program, width: int, method: Invertible) -> Coupling:
    """The equations with a program's values."""
    coupling = Coupling(width, method.reduction, method.activation)
    with torch.no_grad():
        for name, parameter in coupling.named().items():
            parameter.copy_(program.table.trainable[name])
    return coupling


@contextmanager
def coupled(finished: nn.Module, output: nn.Module | None, coupling: Coupling) -> Iterator[None]:
    """Models while a module gives the coupled embeddings, and another reads the inverse."""
    handles = [finished.register_forward_hook(lambda _, __, e: coupling(e))]
    if output is not None:
        handles.append(output.register_forward_pre_hook(lambda _, args: (coupling.back(args[0]), *args[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# family -> what gives the finished embeddings, what projects onto the vocabulary, the width of the embeddings
PLACES: dict[str, tuple[str, str | None, int]] = {
    "BertModel": ("embeddings", None, 24),
    "BertForMaskedLM": ("bert.embeddings", "cls.predictions.decoder", 24),
    "BertForSequenceClassification": ("bert.embeddings", None, 24),
    "GPT2LMHeadModel": ("transformer.drop", "lm_head", 21),
    "LlamaForCausalLM": ("model.embed_tokens", "lm_head", 24),
    "AlbertForMaskedLM": ("albert.embeddings", "predictions.decoder", 10),
    "T5ForConditionalGeneration": ("encoder.embed_tokens", "lm_head", 24),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", PLACES)
def test_equation(family: str, training: bool) -> None:
    """Outputs and all gradients; dropout draws in the model's own order. T5 has one module for the dropout of its
    embeddings and of its results, so that its coupling is written before it, and it is compared without dropout."""
    finished, output, width = PLACES[family]
    model, inputs, method = build(family), call(family), Invertible(reduction=1.5, activation="gelu")
    if family.startswith("T5"):
        model.get_submodule("encoder").embed_tokens = nn.Embedding.from_pretrained(model.shared.weight)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    base = pg.trace(model, inputs)
    tuned = zoo.randomise(base.apply(method), 0.3)
    coupling = as_coupling(tuned, width, method)
    torch.manual_seed(3)
    ours = zoo.leaves(tuned.module().train(training)(**inputs))
    torch.manual_seed(3)
    with coupled(model.get_submodule(finished), output and model.get_submodule(output), coupling):
        theirs = zoo.leaves(model.train(training)(**inputs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    p, named = tuned.table.trainable, coupling.named()
    assert p.keys() == named.keys()
    grads = [torch.autograd.grad(sum(out.square().sum() for out in outs), list(of))
             for outs, of in ((ours, [p[name] for name in named]), (theirs, named.values()))]  # fmt: skip
    for name, mine, want in zip(named, *grads, strict=True):
        assert float(want.abs().max()) > 0, name
        torch.testing.assert_close(mine, want, rtol=1e-8, atol=1e-10 * float(want.abs().max()), msg=name)


class Through(nn.Module):
    """A table, a block that adds nothing, and a head: what the head reads is what the block read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tok, self.vocab = nn.Embedding(zoo.VOCAB, width), nn.Linear(width, zoo.VOCAB)
        self.block = zoo.NanoBlock(width, 1, 20, "sdpa")
        for linear in (self.block.out, self.block.proj):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, idx: Tensor) -> Tensor:
        return self.vocab(self.block(self.tok(idx)))


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("reduction", [2, 0.5])
def test_the_inverse_inverts(width: int, reduction: float) -> None:
    torch.manual_seed(0)
    inputs = zoo.example("nano")
    base = pg.trace(Through(width).to(F64), inputs)
    both = zoo.randomise(base.apply(Invertible(reduction=reduction)), 0.5)
    alone = zoo.randomise(base.apply(Invertible(reduction=reduction, inverse=False)), 0.5)
    plain, back, there = (zoo.leaves(one.module().eval()(**inputs))[0] for one in (base, both, alone))
    torch.testing.assert_close(back, plain, rtol=0, atol=1e-13)
    assert float((there - plain).detach().abs().max()) > 0.1


# where it stands

HEADS: dict[str, list[str]] = {
    "BertModel": ["embedding"],
    "BertForMaskedLM": ["embedding", "head"],
    "BertForPreTraining": ["embedding", "head.0"],
    "BertForTokenClassification": ["embedding"],
    "GPT2LMHeadModel": ["embedding", "head"],
    "GPT2ForTokenClassification": ["embedding"],
    "LlamaForCausalLM": ["embedding", "head"],
    "T5ForConditionalGeneration": ["encoder.embedding", "head"],
    "T5EncoderModel": ["embedding"],
}


@pytest.mark.parametrize("family", HEADS)
def test_the_head_of_tokens_reads_the_inverse_and_no_other(family: str) -> None:
    base = traced(family)
    assert [edit.site for edit in base.apply(Invertible()).edits] == HEADS[family]
    assert [edit.site for edit in base.apply(Invertible(inverse=False)).edits] == HEADS[family][:1]


def test_a_decoder_beside_an_encoder_is_changed_where_it_is_chosen() -> None:
    base = traced("T5ForConditionalGeneration")
    both = base.apply(Invertible(at="embedding"))
    assert [edit.site for edit in both.edits] == ["encoder.embedding", "decoder.embedding", "head"]
    assert both.count().trainable == base.apply(Invertible()).count().trainable


def test_what_reads_the_coupled_embeddings_of_bert() -> None:
    """All who read them do: q, k, v and the residual add; and they are behind the dropout."""
    lines = traced("BertModel").apply(Invertible()).text().splitlines()
    assert sum("%embedding.invertible.cat" in line.partition("=")[2] for line in lines) == 4
    assert sum("slice(%embedding.dropout," in line for line in lines) == 2
    assert sum("%embedding.dropout" in line.partition("=")[2] for line in lines) == 2


class Two(nn.Module):
    """Two tables whose rows are added, or put side by side."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.one, self.two = (nn.Embedding(31, width) for width in widths)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        one, two = self.one(tokens), self.two(others)
        return self.layer(one + two if one.shape == two.shape else torch.cat([one, two], -1))


@pytest.mark.parametrize("widths", [(12, 12), (5, 7)])
def test_two_tables_of_one_sequence_are_refused(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    base = pg.trace(Two(widths), {name: torch.randint(0, 31, (2, 7)) for name in ("tokens", "others")})
    with pytest.raises(pg.RecipeError, match="embed one sequence of tokens"):
        base.apply(Invertible())
    one = base.apply(Invertible(at='embedding.where(path="one")'))
    assert [edit.site for edit in one.edits] == ["embedding.0"]


class Apart(nn.Module):
    """Two sequences, whose embeddings of other widths are made as wide and read one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(31, 5), nn.Embedding(31, 7)
        self.first, self.second = nn.Linear(5, 12), nn.Linear(7, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        return self.layer(torch.cat([self.first(self.one(tokens)), self.second(self.two(others))], 1))


def test_tables_of_two_widths_are_refused() -> None:
    torch.manual_seed(0)
    inputs = {"tokens": torch.randint(0, 31, (2, 7)), "others": torch.randint(0, 31, (2, 5))}
    with pytest.raises(pg.RecipeError, match=r"have one width, .* have \[5, 7\]"):
        pg.trace(Apart(), inputs).apply(Invertible())


# how it starts, and its size


def test_how_it_starts() -> None:
    base, inputs = traced("BertForMaskedLM"), call("Bert")
    outputs = [zoo.leaves(one.module().eval()(**inputs))[0] for one in (base, base.apply(Invertible(init="identity")))]
    assert torch.equal(*outputs)
    wide = zoo.traced("bert").apply(Invertible(reduction=0.1)).table.trainable
    for end in ("down_weight", "up_weight"):
        assert plain.std_of(wide, end)[0] == pytest.approx(0.02, rel=0.05)
    assert all(not value.any() for name, value in wide.items() if name.endswith("bias"))


@pytest.mark.parametrize(("width", "reduction"), [(24, 2.0), (21, 2.0), (21, 3.5)])
def test_count(width: int, reduction: float) -> None:
    """F: (E - H) M + M + M H + H and G the other way, H = E // 2; both ends share them."""
    base = traced("GPT2LMHeadModel" if width == 21 else "BertForMaskedLM")
    first, second = width // 2, width - width // 2
    m, n = int(second // reduction), int(first // reduction)
    own = second * m + m + m * first + first + first * n + n + n * second + second
    assert base.apply(Invertible(reduction=reduction)).count().trainable == own


# beside other passes


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    base = traced("BertForMaskedLM")
    madx = (Invertible(name="xx"), Pfeiffer(width=12, name="xx"), Pfeiffer(width=3, name="task"))
    tuned = zoo.randomise(base.apply(*madx), 0.3)
    loaded = base.load_adapter(tuned.save_adapter(tmp_path / "both"))
    assert loaded.text() == tuned.text()
    assert loaded.table.hashes() == tuned.table.hashes()
    language = base.load_adapter(tuned.only("xx").save_adapter(tmp_path / "language"))
    assert [str(method) for method in language.recipe.passes()] == list(map(str, madx[:2]))
    assert language.remove(0).remove(0).text() == base.text()


def test_what_does_not_fold_says_why() -> None:
    tuned = zoo.randomise(traced("LlamaForCausalLM").apply(Invertible(), LoRA(at="head|embedding", rank=2)), 0.3)
    with pytest.raises(pg.NoFold, match="invertible: it is nonlinear, so no weight can express it"):
        pg.fold(tuned)
    folded, inputs = pg.fold(tuned, partial=True), call("Llama")
    assert {edit.site for edit in folded.edits} == {"embedding", "head"}
    assert all(folded.history[edit.application].method.word == "invertible" for edit in folded.edits)
    torch.testing.assert_close(*(one.module().eval()(**inputs).logits for one in (folded, tuned)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("other", [LoRA(at="head", rank=2), TrainableTokens(tokens=(3, 5))])
def test_what_reads_the_heads_input_comes_later(other: Pass) -> None:
    base, inputs = traced("BertForMaskedLM"), call("Bert")
    with pytest.raises(pg.Conflict, match="reads what head reads, so that invertible.* Apply invertible first"):
        base.apply(other, Invertible())
    method = Invertible()
    tuned = zoo.randomise(base.apply(method, other), 0.3)
    coupling = as_coupling(tuned, 24, method)
    model = build("BertForMaskedLM")
    folded = pg.fold(tuned.remove(0), untie=True)
    model.cls.predictions.decoder.weight = nn.Parameter(folded.table["cls.predictions.decoder.weight"].tensor)
    model.bert.embeddings.word_embeddings.weight = nn.Parameter(
        folded.table["bert.embeddings.word_embeddings.weight"].tensor
    )
    with coupled(model.bert.embeddings, model.cls.predictions.decoder, coupling):
        theirs = model(**inputs).logits
    torch.testing.assert_close(tuned.module().eval()(**inputs).logits, theirs, rtol=0, atol=1e-10)


def test_two_of_them_where_both_would_be_taken_back() -> None:
    one, two = Invertible(name="one"), Invertible(name="two")
    with pytest.raises(pg.Conflict, match="head would take back invertible.* in a wrong order. Apply one of them"):
        traced("LlamaForCausalLM").apply(one, two)
    assert len(traced("BertModel").apply(one, two).edits) == 2


@pytest.mark.parametrize("family", ["BertModel", "LlamaForCausalLM"])
@pytest.mark.parametrize(
    ("onto", "first", "whole"),
    [("tokens", True, True), ("tokens", False, True), ("embeddings", True, True), ("embeddings", False, False)],
)
def test_rows_of_a_prompt(family: str, onto: Any, first: bool, whole: bool) -> None:
    """Rows among the tokens are coupled like them; rows onto the embeddings where they stand there before."""
    passes = (Prompt(length=3, onto=onto), Invertible(inverse=False))
    lines = traced(family).apply(*(passes if first else passes[::-1])).text().splitlines()
    (cut,) = [line for line in lines if "%embedding.invertible.slice:" in line]
    assert ("f64[B, S, 12]" in cut) != whole, cut


@pytest.mark.parametrize(("name", "finished"), [("gpt2", "transformer.drop"), ("llama", "model.embed_tokens")])
def test_tokens_that_are_generated_with_a_cache(name: str, finished: str) -> None:
    model, method, inputs = zoo.build(name, dtype=F64), Invertible(), zoo.example(name, 2, 6, masked=False)
    tuned = zoo.randomise(zoo.cached(name).apply(method), 0.3)
    options: dict[str, Any] = {"min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ours = tuned.module().eval().generate(**inputs, **options)
    with coupled(model.get_submodule(finished), model.get_submodule("lm_head"), as_coupling(tuned, zoo.WIDTH, method)):
        theirs = model.generate(**inputs, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # generate gives its scores in float32


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "reduction": (lambda: Invertible(reduction=0), "reduction must be above 0, got 0"),
    "activation": (lambda: Invertible(activation="celu"), "activation must be .*got 'celu'"),
    "init": (lambda: Invertible(init="zero"), "init must be .*got 'zero'"),  # pyright: ignore[reportArgumentType]
    "narrow": (lambda: traced("BertModel").apply(Invertible(reduction=13)), "reduction=13 leaves nothing of 12"),
    "positions": (
        lambda: traced("BertModel").apply(Invertible(at="attention.q")),
        "none of the 2 sites at attention.q embeds the tokens of a sequence",
    ),
    "pictures": (lambda: zoo.traced("vit").apply(Invertible()), "no table lookup"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses(case: str) -> None:
    build, words = REFUSED[case]
    with pytest.raises(pg.PeftGraphError, match=words):
        build()


@settings(max_examples=30)
@given(
    reduction=st.floats(0.1, 64),
    activation=st.sampled_from(list(ACTIVATIONS)),
    init=st.sampled_from(["bert", "identity"]),
    inverse=st.booleans(),
)
def test_spec_round_trip(**options: Any) -> None:
    method = Invertible(**options)
    assert pg.parse_pass(str(method)) == method
