"""Prompts on pictures and sounds: as the model's own code with the rows among its embeddings, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass
from peftgraph.passes import LoRA, LoReFT, Prefix, Prompt

F64 = torch.float64
LENGTH = 3
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
# name -> class of the model, of its configuration, the module that gives the finished embeddings, more sizes
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", "embeddings", {}),
    "vit_for_labels": ("ViTForImageClassification", "ViTConfig", "vit.embeddings", {"num_labels": 5}),
    "beit": ("BeitModel", "BeitConfig", "embeddings", {"use_absolute_position_embeddings": True}),
    "dinov2": ("Dinov2Model", "Dinov2Config", "embeddings", {}),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "embeddings", {}),
    "deit": ("DeiTModel", "DeiTConfig", "embeddings", {}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", "pre_layrnorm", {}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", "embeddings", {}),
}


def build(name: str, attn: str = "sdpa", **more: Any) -> nn.Module:
    """A model in float64, whose class token and positions are not zero."""
    model, config, _, own = MODELS[name]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**SIZES | own | more, attn_implementation=attn)
    built = getattr(transformers, model)(settings).to(F64).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.requires_grad_(False)


SIDES = {"pixel_values": (2, 3)}  # of one size: what is looked at is what comes behind


def pictures(batch: int = 2, size: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, size, size, dtype=F64)}


@cache
def traced(name: str, attn: str = "sdpa") -> pg.Program:
    return pg.trace(build(name, attn), pictures(3))


def visual(place: Any = "front", **options: Any) -> Prompt:
    return Prompt(**{"at": "block", "length": LENGTH, "init": "normal", "onto": "embeddings", "place": place} | options)


def tuned(program: pg.Program, place: str = "front", **options: Any) -> tuple[pg.Program, Tensor]:
    """The program after a prompt, and the prompt."""
    torch.manual_seed(1)
    after = program.apply(visual(place, **options))
    (rows,) = after.table.trainable.values()
    return after, rows


@contextmanager
def longer(model: nn.Module, module: str, rows: Tensor, after: int) -> Iterator[nn.Module]:
    """The model while a module gives the rows as well."""

    def hook(_: nn.Module, __: Any, given: Any) -> Any:
        x = given[0] if isinstance(given, tuple) else given
        x = torch.cat([x[:, :after], rows.expand(len(x), -1, -1), x[:, after:]], 1)
        return (x, *given[1:]) if isinstance(given, tuple) else x

    handle = model.get_submodule(module).register_forward_hook(hook)
    try:
        yield model
    finally:
        handle.remove()


def without(x: Tensor, after: int) -> Tensor:
    return torch.cat([x[:, :after], x[:, after + LENGTH :]], 1) if x.dim() == 3 else x


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max().detach()) <= tolerance * float(b.abs().max().detach())


def answers(program: pg.Program, inputs: dict[str, Any]) -> list[Tensor]:
    return zoo.leaves(program.module().eval()(**inputs))


@pytest.mark.parametrize("place", ["front", "after_first"])
@pytest.mark.parametrize(
    ("name", "attn"), [*((name, "sdpa") for name in MODELS), ("vit", "eager"), ("beit", "eager"), ("clip", "eager")]
)
def test_the_models_own_code_gives_the_same(name: str, attn: str, place: str) -> None:
    after, inputs, model = int(place == "after_first"), pictures(), build(name, attn)
    whole, rows = tuned(traced(name, attn), place, returns="all")
    cut, same = tuned(traced(name, attn), place)
    assert torch.equal(rows, same)
    again = rows.detach().clone().requires_grad_()
    with longer(model, MODELS[name][2], again, after):
        theirs = zoo.leaves(model(**inputs))
    ours = answers(whole, inputs)
    close(ours, theirs, 1e-10)
    close(answers(cut, inputs), [without(x, after) for x in theirs], 1e-10)
    mine, own = (
        torch.autograd.grad(sum(out.square().sum() for out in outs), p) for outs, p in ((ours, rows), (theirs, again))
    )
    assert mine[0].abs().max() > 1e-3
    close(list(mine), list(own), 1e-10)


def test_a_plain_model_from_the_definition() -> None:
    """[x0; P; E] through blocks that nobody's library wrote, whose length stands as a number in the graph."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.first = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, 1, 12))
            self.places = nn.Parameter(torch.randn(1, 5, 12))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True) for _ in range(2)
            )
            self.head = nn.Linear(12, 7)

        def forward(self, pixels: Tensor, rows: Tensor | None = None) -> Tensor:
            x = self.patch(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
            if rows is not None:
                x = torch.cat([x[:, :1], rows.expand(len(x), -1, -1), x[:, 1:]], 1)
            for block in self.blocks:
                x = block(x)
            return self.head(x[:, 0])

    torch.manual_seed(0)
    model, pixels = Plain().to(F64).eval(), pictures()["pixel_values"]
    program, rows = tuned(pg.trace(model, {"pixels": pictures(3)["pixel_values"]}), "after_first")
    close([program.module().eval()(pixels=pixels)], [model(pixels, rows.detach())], 1e-12)


def test_rows_of_nothing_but_zeros_in_values_and_scores_are_heard_only_as_places() -> None:
    """A ViT whose queries are zero looks everywhere alike: L rows weigh L of L + T places."""
    model = build("vit", num_hidden_layers=1)
    with torch.no_grad():
        layer = model.layers[0]
        for part in (layer.attention.q_proj, layer.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
        layer.attention.v_proj.bias.zero_()
        layer.attention.o_proj.bias.zero_()
        layer.layernorm_before.bias.zero_()
    base, inputs = pg.trace(model, pictures(3)), pictures()
    program, rows = tuned(base, "after_first")
    with torch.no_grad():
        rows.fill_(1.0)  # constant over features: the norm makes zeros of it
    x = model.embeddings(inputs["pixel_values"])
    with torch.no_grad():
        plain = layer.attention.o_proj(layer.attention.v_proj(layer.layernorm_before(x)).mean(1, keepdim=True))
        theirs = model.layernorm(x + plain * 5 / (5 + LENGTH))
    close(answers(program, inputs)[:1], [theirs], 1e-6)  # the norm's eps leaves a trace of the rows


def test_hidden_states_are_cut_too() -> None:
    """The first of them is what the rows are put in front of."""
    inputs = pictures() | {"output_hidden_states": True}
    model = build("vit")
    base = pg.trace(model, inputs)
    whole, rows = tuned(base, "after_first", returns="all")
    cut, _ = tuned(base, "after_first")
    with longer(model, "embeddings", rows.detach(), 1):
        theirs = zoo.leaves(model(**inputs))
    assert [x.shape[1] for x in theirs if x.dim() == 3] == [5 + LENGTH] * 4
    close(answers(whole, inputs), theirs)
    close(answers(cut, inputs), [without(x, 1) for x in theirs])
    assert cut.remove().text() == base.text()


def test_pictures_of_other_sizes() -> None:
    """BEiT without positions takes any size of picture, and so does the longer model."""
    model = build("beit", use_absolute_position_embeddings=False)
    program, rows = tuned(pg.trace(model, pictures(3)), "after_first", returns="all")
    inputs = pictures(2, 12)
    with longer(model, "embeddings", rows.detach(), 1):
        theirs = zoo.leaves(model(**inputs))
    assert theirs[0].shape[1] == 10 + LENGTH
    close(answers(program, inputs), theirs)


def test_the_tower_of_pictures_beside_one_of_words() -> None:
    """Of the two stacks of a CLIP, the one that no embedding of tokens feeds."""
    text = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SIZES)).to(F64).eval()
    inputs = pictures() | {"input_ids": torch.randint(3, 31, (2, 7)), "attention_mask": torch.ones(2, 7).long()}
    program, rows = tuned(pg.trace(model, inputs), "after_first")
    with longer(model, "vision_model.pre_layrnorm", rows.detach(), 1):
        theirs = model(**inputs)
    ours = program.module().eval()(**inputs)
    close([ours.logits_per_image, ours.image_embeds], [theirs.logits_per_image, theirs.image_embeds])


def test_sounds_in_front_of_a_decoder() -> None:
    """Whisper's decoder attends to the rows of its encoder as to sounds, and has none of its own."""
    model, inputs = zoo.build("whisper", dtype=F64).requires_grad_(False), zoo.example("whisper", 2, 7, F64)
    program, rows = tuned(zoo.traced("whisper", "sdpa", F64), returns="all")
    assert [edit.site for edit in program.edits] == ["encoder.0.block"]

    def front(_: nn.Module, arguments: Any, keywords: Any) -> Any:
        return (torch.cat([rows.expand(2, -1, -1), arguments[0]], 1), *arguments[1:]), keywords

    handle = model.encoder.layers[0].register_forward_pre_hook(front, with_kwargs=True)
    theirs = model(**inputs)
    handle.remove()
    ours = program.module().eval()(**inputs)
    for key in ("last_hidden_state", "encoder_last_hidden_state"):
        close([ours[key]], [theirs[key]])


@pytest.mark.parametrize("place", ["front", "after_first"])
def test_a_saved_prompt_answers_the_same(place: str, tmp_path: Path) -> None:
    program, _ = tuned(traced("vit"), place)
    assert program.count().trainable == LENGTH * 16
    again = traced("vit").load_adapter(program.save_adapter(tmp_path / "adapter"))
    assert str(again.recipe) == str(program.recipe)
    close(answers(again, pictures()), answers(program, pictures()), 0.0)


@pytest.mark.parametrize("others", [(LoRA(at="attention.q", rank=2),), (Prefix(length=2, hidden=None),), (LoReFT(),)])
@pytest.mark.parametrize("name", ["vit", "beit"])
def test_other_passes_come_before_or_after(name: str, others: tuple[Pass, ...]) -> None:
    base, results = traced(name), []
    for recipe in ((visual("after_first"), *others), (*others, visual("after_first"))):
        program = base.apply(*recipe)
        with torch.no_grad():
            for key, value in sorted(program.table.trainable.items()):
                value.copy_(torch.linspace(-0.3, 0.4, value.numel(), dtype=F64).view_as(value) + len(key) / 100)
        results.append(answers(program, pictures()))
        for which in (0, 1):
            left = program.remove(which)
            alone = base.apply(left.history[0].method)
            with torch.no_grad():
                for key, value in alone.table.trainable.items():
                    value.copy_(program.table[key].tensor)
            close(answers(left, pictures()), answers(alone, pictures()), 1e-13)
            assert left.remove().text() == base.text()
    close(results[0], results[1], 1e-13)


def test_what_can_be_folded_beside_a_prompt_is() -> None:
    program = zoo.randomise(traced("vit").apply(LoRA(at="attention.q", rank=2), visual("after_first")))
    folded = pg.fold(program, partial=True)
    assert [applied.method.word for applied in folded.history] == ["prompt"]
    close(answers(folded, pictures()), answers(program, pictures()), 1e-12)
    with pytest.raises(pg.NoFold, match="no weight stores rows of a sequence"):
        pg.fold(program)


def test_one_stack_takes_one_prompt() -> None:
    program, _ = tuned(traced("vit"))
    with pytest.raises(pg.Conflict, match=r"prompt.* and prompt.* both replace the input of 0\.block"):
        program.apply(visual(name="second"))


# what is refused


class Picture(nn.Module):
    """One block on patches, and something of a model's own done to its T = 4 places."""

    def __init__(self, own: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.own = own
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True)
        self.mix, self.conv = nn.Linear(4, 4), nn.Conv1d(12, 12, 3, padding=1)
        self.bias, self.places = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.zeros(4, 12))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2) + self.places
        return self.own(self, self.layer(x))


OWN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "laid out": (lambda m, x: x.view(x.shape[0], 2, 2, 12), r"\(view\) lays its 4 positions out as \d x 2 x 2 x 12"),
    "convolution": (lambda m, x: m.conv(x.mT), r"\(conv1d\) is a convolution over the positions"),
    "mixed": (
        lambda m, x: m.mix(x.mT),
        r"\(linear\) does not take 3 positions more: linear of .* features by a weight for 4",
    ),
    "stored": (lambda m, x: x + m.bias, r"@bias, 4 x 1, holds a value for each of 4 positions, and none for rows"),
    "numbered": (
        lambda m, x: x + torch.arange(4, dtype=x.dtype)[:, None],
        r"\(arange\) numbers the positions, and rows have no number",
    ),
    "mean": (lambda m, x: x.sum(1) / 4, r"\(div\) computes with the number of positions"),
    "last": (lambda m, x: x[:, 3], r"\(select\) takes positions by numbers that may be counted from the end of 4"),
    "rear": (lambda m, x: x[:, 2:4], r"\(slice\) takes positions by numbers that may be counted from the end of 4"),
    "parted": (
        lambda m, x: x.split([1, 3], 1)[1],
        r"parts the 4 positions, and it is not known which part has the rows",
    ),
    "joined": (lambda m, x: x.flatten(1), r"would give \d x 84 instead of \d x 48, where the rows have no axis"),
    "turned": (lambda m, x: x.roll(1, 1), r"\(roll\) is not known to go through with more positions"),
    "reversed": (
        lambda m, x: x.masked_fill(torch.arange(4).flip(0)[:, None] < 1, 0.5),
        r"\(flip\) is known for 4 positions alone",
    ),
}


@pytest.mark.parametrize("own", OWN)
def test_what_rows_cannot_be_followed_through(own: str) -> None:
    function, words = OWN[own]
    torch.manual_seed(0)
    program = pg.trace(Picture(function).to(F64), pictures(), fixed=SIDES)
    with pytest.raises(pg.PeftGraphError, match=rf"No rows can be prepended to what 0\.block reads: .*{words}"):
        program.apply(visual())


ALIKE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean": lambda m, x: x.mean(1),
    "sum": lambda m, x: x.sum(1) / 3,
    "second": lambda m, x: x[:, 1],
    "last": lambda m, x: x[:, -1],
    "behind": lambda m, x: x[:, 1:] * 2,
    "seen": lambda m, x: x.masked_fill(torch.arange(4)[:, None] < 1, 0.5),
    "heads": lambda m, x: x.view(x.shape[0], 4, 3, 4).transpose(1, 2).reshape(x.shape[0], 3, 4, 4).mean(1),
}


@pytest.mark.parametrize("own", ALIKE)
def test_what_they_can_be_followed_through(own: str) -> None:
    """The near misses: here the code does the same, whatever the length."""
    torch.manual_seed(0)
    model = Picture(ALIKE[own]).to(F64).eval()
    program, rows = tuned(pg.trace(model, pictures(3), fixed=SIDES), returns="all")
    pixels = pictures()["pixel_values"]
    x = model.patch(pixels).flatten(2).transpose(1, 2)
    x = model.layer(torch.cat([rows.detach().expand(2, -1, -1), x], 1))
    if own == "heads":
        theirs = x.view(2, 4 + LENGTH, 3, 4).mean(2)
    elif own == "seen":
        theirs = x.masked_fill(torch.arange(4 + LENGTH)[:, None] < 1, 0.5)
    else:
        theirs = ALIKE[own](model, x)
    close([program.module().eval()(pixel_values=pixels)], [theirs])


def test_positions_that_are_returned_with_the_batch_are_not_cut() -> None:
    torch.manual_seed(0)
    program = pg.trace(Picture(lambda m, x: x.reshape(-1, 12)).to(F64).eval(), pictures(3))
    whole, _ = tuned(program, returns="all")
    assert whole.module().eval()(**pictures()).shape == (2 * (4 + LENGTH), 12)
    with pytest.raises(pg.PeftGraphError, match='positions and other axes on one; choose returns="all"'):
        program.apply(visual())


def test_position_biases_are_refused() -> None:
    biased = pg.trace(build("beit", use_relative_position_bias=True), pictures())
    with pytest.raises(pg.PeftGraphError, match=r"alone, of which @.*relative_position_bias_table holds values, and"):
        biased.apply(visual())


def test_blocks_that_tokens_feed_are_refused() -> None:
    words = "is the first block of a stack that no embedding feeds"
    with pytest.raises(pg.NoMatch, match=f"none of the 2 sites at block embeds tokens.*, or {words}"):
        zoo.traced("bert").apply(visual())
    with pytest.raises(pg.NoMatch, match=words):
        traced("vit").apply(visual(at="block & layer(1)"))
    with pytest.raises(pg.NoMatch, match="embeds tokens that are an input of the model"):
        traced("vit").apply(Prompt(at="block", length=2))


@pytest.mark.parametrize("options", [{"init": "vocabulary"}, {"init": "classes", "classes": ((1,),)}])
def test_there_are_no_words_to_start_from(options: dict[str, Any]) -> None:
    with pytest.raises(pg.PeftGraphError, match=r"0\.block has no table to take init=.* from; choose"):
        traced("vit").apply(visual(**options))
