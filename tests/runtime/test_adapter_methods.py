"""`pg.tune`, and what a module offers beside the model's own methods: counts, and a merged plain model."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import transformers
import zoo
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.passes import LoRA
from peftgraph.tuning import example_from

WORDS = ["[PAD]", "The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "."]
SIZES = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[PAD]")


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **options)).eval()


@pytest.fixture(scope="module")
def tuned() -> tuple[Any, Any, dict[str, Tensor]]:
    """A classifier, its module with values everywhere, and a batch of other sizes than the example's."""
    model = classifier(num_labels=3)
    net = pg.tune(model, tokenizer(), "lora{rank=2}; train{at=head}", verify="off")
    zoo.randomise(pg.program_of(net))
    return model, net.eval(), dict(tokenizer()(["The lazy fox jumps ."] * 2, return_tensors="pt"))


def test_a_module_in_one_line_trains_and_counts(tuned, capsys: pytest.CaptureFixture[str]) -> None:
    model, net, batch = tuned
    assert isinstance(net, transformers.BertForSequenceClassification)
    net(**batch, labels=torch.tensor([0, 2])).loss.backward()
    trainable = 2 * 2 * (2 * 24) + 3 * 24 + 3
    every = sum(parameter.numel() for parameter in model.parameters()) + 2 * 2 * (2 * 24)
    assert net.get_nb_trainable_parameters() == (trainable, every)
    net.print_trainable_parameters()
    share = 100 * trainable / every
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {share:.4f}\n"
    )


def test_a_merged_model_is_plain_and_computes_the_same(tuned) -> None:
    model, net, batch = tuned
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = net.merge_and_unload()
    assert type(merged) is type(model)
    assert merged is not model
    torch.testing.assert_close(merged(**batch).logits, net(**batch).logits, atol=1e-5, rtol=0)
    assert not torch.allclose(merged(**batch).logits, model(**batch).logits, atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copy_of_a_module_merges_its_own_values(tuned) -> None:
    _, net, batch = tuned
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.0 + parameter.requires_grad)
    merged = twin.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, twin(**batch).logits, atol=1e-5, rtol=0)
    assert not torch.allclose(merged(**batch).logits, net(**batch).logits, atol=1e-3)
    assert pg.program_of(twin).text() == pg.program_of(net).text()


def test_what_cannot_be_merged_says_why(tuned) -> None:
    _, net, _ = tuned
    with pytest.raises(pg.PeftGraphError, match="no option 'safe_merge'. Every merge is proved to be exact."):
        net.merge_and_unload(safe_merge=True)
    with pytest.raises(pg.PeftGraphError, match="Linear is no module of a program"):
        pg.program_of(nn.Linear(2, 2))
    unfoldable = zoo.traced("nano").apply("prefix{hidden=none}").module()
    with pytest.raises(pg.NoFold, match="prefix"):
        unfoldable.merge_and_unload()  # type: ignore[operator]


def test_a_module_keeps_its_model_and_a_program_does_not() -> None:
    x = torch.randn(2, 6)
    net = pg.tune(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval(), (x,), LoRA(at="head", rank=2))
    zoo.randomise(pg.program_of(net))
    gc.collect()
    merged: Any = net.merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(merged(x), net.eval()(x), atol=1e-5, rtol=0)
    program = pg.trace(nn.Sequential(nn.Linear(6, 4)).eval(), (x,)).apply(LoRA(at="head", rank=2))
    gc.collect()
    with pytest.raises(pg.PeftGraphError, match="The Sequential that was traced is not there any more"):
        program.module().merge_and_unload()  # type: ignore[operator]


class Owned(nn.Module):
    """A model that calls a part of its own as a method here is called."""

    def __init__(self) -> None:
        super().__init__()
        self.merge_and_unload = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge_and_unload(x)


class Methodical(transformers.BertForSequenceClassification):
    """A model whose class defines a method of that name."""

    def print_trainable_parameters(self) -> str:
        return "my own"


def test_names_that_the_model_uses_stay_its_own() -> None:
    net = pg.tune(Owned().eval(), (torch.randn(2, 6),), LoRA(at="head", rank=2))
    assert isinstance(net.merge_and_unload, nn.Module)
    assert net.get_nb_trainable_parameters() == (20, 48)  # type: ignore[operator]
    model = Methodical(transformers.BertConfig(**SIZES)).eval()
    other: Any = pg.tune(model, {"input_ids": torch.ones(2, 5, dtype=torch.long)}, "bitfit", verify="off")
    assert other.print_trainable_parameters() == "my own"
    assert isinstance(other.merge_and_unload(), Methodical)


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        ({"num_labels": 3}, (3,), torch.long),
        ({"num_labels": 1}, (3,), torch.float32),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, (3, 3), torch.float32),
    ],
    ids=["classes", "number", "several"],
)
def test_labels_of_an_example_are_those_of_the_task(options: dict[str, Any], shape: tuple[int, ...], dtype) -> None:
    model = classifier(**options)
    told = copy.deepcopy(model.config.to_dict())
    example = example_from(model.train(), tokenizer())
    assert (example["labels"].shape, example["labels"].dtype) == (shape, dtype)
    assert sorted(example) == ["attention_mask", "input_ids", "labels"]
    assert (model.config.to_dict(), model.training) == (told, True)
    assert torch.isfinite(model(**example).loss)


def test_examples_of_models_that_generate_have_their_caches_and_decoders() -> None:
    sizes = {"vocab_size": 31, "d_model": 24, "d_kv": 4, "num_heads": 2, "num_layers": 1, "d_ff": 32}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    example = example_from(t5, tokenizer())
    assert example["use_cache"] is True
    assert example["decoder_input_ids"].shape == example["labels"].shape == (3, 5)
    bare = transformers.BertModel(transformers.BertConfig(**SIZES))
    assert sorted(example_from(bare, tokenizer())) == ["attention_mask", "input_ids"]


def test_what_is_no_example_is_refused() -> None:
    model = classifier()
    with pytest.raises(pg.TraceError, match="An example or a tokenizer comes before the methods"):
        pg.tune(model, "some text", "lora")
    with pytest.raises(pg.TraceError, match="got Clip.*A processor makes inputs of pictures or sounds"):
        pg.tune(model, Clip(), "lora")
    with pytest.raises(pg.PeftGraphError, match="No method was given"):
        pg.tune(model, tokenizer())
    with pytest.raises(pg.TraceError, match="ViTModel.forward takes no input_ids"):
        pg.tune(transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)), tokenizer(), "lora")


class Clip:
    """A processor of pictures and texts."""

    model_input_names = ("input_ids", "pixel_values")

    def __call__(self) -> None: ...
