"""Prompt tuning: the model's own code on [P; embed(x)] gives the same, whatever is padded, given or asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import IA3, LoRA, Prefix, Prompt, PTuning

F64 = torch.float64
LENGTH = 4
NAMES = ("bert", "gpt2", "gpt_neox", "llama", "t5")


def tuned(program: pg.Program, **options: Any) -> tuple[pg.Program, Tensor]:
    """The program after a prompt, and the prompt."""
    torch.manual_seed(1)
    after = program.apply(Prompt(length=LENGTH, init="normal", **options))
    (rows,) = after.table.trainable.values()
    return after, rows


def in_front(model: nn.Module, inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The call of the model itself with the rows in front of its embedded tokens."""
    call = dict(inputs)
    embedded, mask = model.get_input_embeddings()(call.pop("input_ids")), inputs["attention_mask"]
    call["inputs_embeds"] = torch.cat([rows.expand(len(embedded), -1, -1), embedded], 1)
    call["attention_mask"] = torch.cat([mask.new_ones(len(mask), LENGTH), mask], 1)
    for name, fill in (("position_ids", None), ("token_type_ids", 0), ("labels", -100)):
        if name in call and call[name].shape == mask.shape:
            front = torch.full_like(mask[:, :LENGTH], fill or 0)
            if fill is None:
                front, call[name] = torch.arange(LENGTH).expand_as(front), call[name] + LENGTH
            call[name] = torch.cat([front, call[name]], 1)
    return call


def answers(output: Any, length: int) -> list[Tensor]:
    """The tensors of an output, without what stands for the rows."""
    return [x[:, LENGTH:] if x.dim() == 3 and x.shape[1] == LENGTH + length else x for x in zoo.leaves(output)]


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max().detach()) <= tolerance * float(b.abs().max().detach())


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_models_own_on_longer_embeddings(name: str) -> None:
    program, rows = tuned(zoo.traced(name, "sdpa", F64))
    model, inputs = zoo.build(name, dtype=F64).requires_grad_(False), zoo.example(name, 2, 9, F64)
    ours = answers(program.module().eval()(**inputs), 9)
    again = rows.detach().clone().requires_grad_()
    theirs = answers(model(**in_front(model, inputs, again)), 9)[: len(ours)]
    close(ours, theirs)
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), p) for outs, p in ((ours, rows), (theirs, again))
    ]
    close(list(grads[0]), list(grads[1]), 1e-11)


def everything(name: str, length: int = 7) -> dict[str, Any]:
    """A call that gives all that runs along the tokens."""
    inputs = zoo.example(name, 3, length, F64)
    inputs["attention_mask"][:] = 1
    inputs["position_ids"] = torch.arange(length).expand(3, -1).clone()
    if name == "bert":
        inputs["token_type_ids"] = torch.randint(0, 2, (3, length))
    else:
        inputs["labels"] = inputs["input_ids"].clone()
    return inputs


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_positions_types_and_labels_grow(name: str) -> None:
    model = zoo.build(name, dtype=F64)
    program, rows = tuned(pg.trace(model, everything(name)))
    net = program.module().eval()
    inputs = everything(name, 9)
    theirs = in_front(model, inputs, rows.detach())
    if name == "bert":  # the rows are of the first token's type
        theirs["token_type_ids"][:, :LENGTH] = inputs["token_type_ids"][:, :1]
    close(answers(net(**inputs), 9), answers(model(**theirs), 9))
    if "labels" in inputs:
        del inputs["labels"], theirs["labels"]
        close(answers(net(**inputs), 9), answers(model(**theirs), 9)[:1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_padding_changes_no_answer(name: str, side: str) -> None:
    program, _ = tuned(zoo.positioned(name))
    batch, single = zoo.unpadded(program.module().eval(), name, side)
    close([batch], [single], 1e-7)  # positions turn in float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_answer_where_distances_are_all(side: str) -> None:
    inputs, alone, tokens = zoo.padded("llama", side)
    program, _ = tuned(zoo.traced("llama", "sdpa", F64))
    net = program.module().eval()
    batch, single = (net(input_ids=one["input_ids"], attention_mask=one["attention_mask"]) for one in (inputs, alone))
    close([batch.logits[:1, tokens]], [single.logits], 1e-7)


def test_rows_behind_the_first_token_leave_the_answer_where_it_is_read() -> None:
    model, inputs = zoo.build("bert", dtype=F64), zoo.example("bert", 2, 9, F64)
    program, rows = tuned(zoo.traced("bert", "sdpa", F64), place="after_first")
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    longer = torch.cat([embedded[:, :1], rows.detach().expand(2, -1, -1), embedded[:, 1:]], 1)
    mask = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), inputs["attention_mask"]], 1)
    theirs = model(inputs_embeds=longer, attention_mask=mask)
    ours = program.module().eval()(**inputs)
    kept = torch.cat([theirs.last_hidden_state[:, :1], theirs.last_hidden_state[:, 1 + LENGTH :]], 1)
    close([ours.pooler_output, ours.last_hidden_state], [theirs.pooler_output, kept])


def test_all_results_are_given_where_asked() -> None:
    whole, rows = tuned(zoo.traced("llama", "sdpa", F64), returns="all")
    cut, other = tuned(zoo.traced("llama", "sdpa", F64))
    with torch.no_grad():
        other.copy_(rows)
    inputs = zoo.example("llama", 2, 9, F64)
    long, short = (program.module().eval()(**inputs).logits for program in (whole, cut))
    assert long.shape[1] == 9 + LENGTH
    close([short], [long[:, LENGTH:]], 0.0)


def test_one_sequence_takes_one_prompt() -> None:
    program, _ = tuned(zoo.traced("nano", "sdpa", F64))
    with pytest.raises(pg.Conflict, match=r"prompt.* and prompt.* both replace the input of embedding"):
        program.apply(Prompt(length=2, name="second"))
    assert (
        program.apply(PTuning(length=2, token=5, encoder="none", name="own")).count().trainable
        == (LENGTH + 2) * zoo.WIDTH
    )


@pytest.mark.parametrize(
    "others", [(LoRA(at="embedding|attention.q", rank=2), IA3()), (Prefix(length=2, hidden=None),)]
)
@pytest.mark.parametrize("onto", ["tokens", "embeddings"])
def test_other_passes_come_before_or_after(others: tuple[Pass, ...], onto: Any) -> None:
    base, inputs = zoo.traced("bert", "sdpa", F64), zoo.example("bert", 2, 9, F64)
    results, prompt = [], Prompt(length=3, onto=onto)
    for recipe in ((prompt, *others), (*others, prompt)):
        program = base.apply(*recipe)
        with torch.no_grad():
            for key, value in sorted(program.table.trainable.items()):
                value.copy_(torch.linspace(-0.3, 0.4, value.numel(), dtype=F64).view_as(value) + len(key) / 100)
        results.append(zoo.leaves(program.module().eval()(**inputs)))
        while program.history:
            program = program.remove(0)
        assert program.text() == base.text()
    close(results[0], results[1], 1e-13)


def test_the_limit_of_positions_leaves_room() -> None:
    program, _ = tuned(zoo.traced("bert"))
    net = program.module().eval()
    assert net(**zoo.example("bert", 1, 64 - LENGTH)).last_hidden_state.shape == (1, 64 - LENGTH, 48)
    with pytest.raises(pg.CallError, match=f"the model takes at most {64 - LENGTH}"):
        net(**zoo.example("bert", 1, 64 - LENGTH + 1))


def test_more_rows_than_there_are_positions_are_refused() -> None:
    assert zoo.traced("bert").apply(Prompt(length=64 - 7)).signature.ranges["S"] == (1, 7)
    with pytest.raises(pg.PeftGraphError, match="sizes that the model does not take.*expand.* add fewer"):
        zoo.traced("bert").apply(Prompt(length=64 - 6))


def test_tokens_that_count_up_are_tokens_still() -> None:
    inputs = zoo.example("bert") | {"input_ids": torch.arange(21).view(3, 7)}
    assert pg.trace(zoo.build("bert"), inputs).apply(Prompt(length=2)).count().trainable == 2 * zoo.WIDTH


def test_masks_whose_ones_hide_are_understood() -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 12)
            self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)

        def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
            return self.layer(self.embed(tokens), src_key_padding_mask=padding)

    torch.manual_seed(0)
    model = Hiding().to(F64).eval()
    tokens, padding = torch.randint(0, 31, (2, 7)), torch.zeros(2, 7, dtype=torch.bool)
    padding[0, :3] = True
    program, rows = tuned(pg.trace(model, {"tokens": tokens, "padding": padding}))
    ours = program.module().eval()(tokens, padding)
    alone = torch.cat([rows.detach()[None], model.embed(tokens[:1, 3:])], 1)
    close([ours[:1, 3:]], [model.layer(alone)[:, LENGTH:]])


def test_starts() -> None:
    program = zoo.traced("t5", "sdpa", F64)
    table = program.table["shared.weight"].tensor

    def start(**options: Any) -> Tensor:
        (rows,) = program.apply(Prompt(length=6, **options)).table.trainable.values()
        return rows.detach()

    assert start().abs().max() <= 0.5
    assert start().min() < -0.25
    assert start(init="code").min() >= 0
    assert start(init="normal").abs().max() > 1
    drawn = start(init="vocabulary", vocabulary=7)
    chosen = {int((row == table).all(1).nonzero()) for row in drawn}
    assert len(chosen) == 6
    assert chosen <= set(range(7))
    words = start(init="classes", classes=((3, 5), (8,)), vocabulary=2)
    assert torch.equal(words[0], table[[3, 5]].mean(0))
    assert torch.equal(words[1], table[8])
    assert {int((row == table).all(1).nonzero()) for row in words[2:]} == {0, 1}


def test_counts_of_the_papers() -> None:
    base = zoo.traced("t5")
    assert base.apply(Prompt(length=5)).count().trainable == 5 * zoo.WIDTH
    assert base.apply(Prompt(at="embedding", length=5)).count().trainable == 2 * 5 * zoo.WIDTH  # as T-Few counts it


def test_specs_round_trip() -> None:
    method = Prompt(
        length=3, init="classes", classes=((1, 2), (3,)), place="after_first", onto="embeddings", returns="all"
    )
    assert pg.parse_pass(str(method)) == method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"init": "zero"}, "init must be"),
        ({"place": "end"}, "place must be"),
        ({"onto": "words"}, "onto must be"),
        ({"returns": "none"}, "returns must be"),
        ({"vocabulary": 0}, "vocabulary must"),
        ({"init": "classes"}, "takes the tokens of 1 to length=100 classes"),
        ({"init": "classes", "classes": ((1,), (2,)), "length": 1}, "takes the tokens of 1 to length=1 classes"),
        ({"classes": ((1,),)}, "init='uniform'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(pg.RecipeError, match=words):
        Prompt(**options)


def test_what_has_no_tokens_takes_no_prompt() -> None:
    with pytest.raises(pg.NoMatch, match="no table lookup"):
        zoo.traced("vit").apply(Prompt())


def test_types_are_no_tokens() -> None:
    program = pg.trace(zoo.build("bert"), everything("bert"))
    with pytest.raises(pg.NoMatch, match="none of the 1 sites at .* embeds tokens that are an input of the model"):
        program.apply(Prompt(at=pg.embedding.where(path=".*token_type.*")))
