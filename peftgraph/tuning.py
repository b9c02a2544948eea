"""From a model to a module that trains, in one line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftgraph.capture.progress import Progress
from peftgraph.errors import PeftGraphError, TraceError
from peftgraph.program import Program, trace
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.recipe import Methods, as_passes
from peftgraph.runtime.adapter_methods import owner_of, values_of
from peftgraph.runtime.training_region import Optimise

TEXT = "The quick brown fox jumps over the lazy dog."
ROWS, LENGTH, TARGET = 3, 7, 5  # of an example from a tokenizer


def tune(
    model: nn.Module,
    example: Any,
    *methods: Methods,
    dtype: torch.dtype | None = None,
    root: str = "",
    fixed: Mapping[str, Sequence[int]] | None = None,
    assume: Mapping[str, bool] | None = None,
    verify: Literal["off", "example", "sizes"] = "sizes",
    progress: Progress | None = None,
    cache: bool | str | PathLike[str] = False,
    optimise: Optimise = "auto",
    activation_budget: float = 1.0,
    keep_logits: bool = True,
) -> nn.Module:
    """Return a model with methods applied to it, ready to train: `pg.tune(model, tokenizer, "lora{rank=8}; bitfit")`.

    The same as `pg.trace(model, example).apply(*methods).module()`. `net.print_trainable_parameters()` counts,
    `net.merge_and_unload()` returns a plain model when training is over, and `pg.program_of(net)` is the program, with
    `save_adapter`, `diff` and all else.

    Args:
        model: any nn.Module. It is not modified.
        example: keyword inputs, a tuple of positional ones, or a tensor; or a tokenizer of transformers, from which a
            small example is made: text, labels where the model takes any, and the cache of a model that generates.
        methods: as `Program.apply` takes them: passes, their text, recipes, or lists of these.
        dtype: of new parameters, as for `Program.apply`.
        root: this and the next are those of `pg.trace`.
        fixed: axes that stay the example's.
        assume: outcomes of branches.
        verify: how much of the program is compared with the model.
        progress: called with what is being done.
        cache: whether, or where, traces are kept.
        optimise: this and the next are those of `Program.module`.
        activation_budget: the fraction of activations to keep.
        keep_logits: whether training gives logits.

    Raises:
        PeftGraphError: no method is given, or a step refuses; the message says what to change.
    """
    is_tokenizer = _is_text_tokenizer(example)
    if not is_tokenizer:
        _require_inputs(example)
    passes = as_passes(methods)
    if not passes:
        raise PeftGraphError('No method was given: pg.tune(model, example, "lora{rank=8}").')
    inputs = example_from(model, example) if is_tokenizer else example
    program = trace(model, inputs, root=root, fixed=fixed, assume=assume, verify=verify, progress=progress, cache=cache)
    tuned = program.apply(*passes, dtype=dtype)
    return tuned.module(optimise=optimise, activation_budget=activation_budget, keep_logits=keep_logits)


def program_of(net: nn.Module) -> Program:
    """Return the program of a module, with the values that the module's parameters have now.

    Raises:
        PeftGraphError: it is no module of a program.
    """
    return owner_of(net).program(values_of(net))


def example_from(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Return a small example for a model from its tokenizer.

    Labels are among it where the model takes them, in the shape of its logits without the classes. A model that
    generates is traced with its cache, one with a decoder of its own gets tokens for that.

    Raises:
        TraceError: the tokenizer makes no tokens, or the model takes none of what it makes.
    """
    accepted = inspect.signature(model.forward).parameters
    encoded = tokenizer([TEXT] * ROWS, return_tensors="pt")
    inputs: dict[str, Any] = {
        name: value[:, :LENGTH].contiguous() for name, value in encoded.items() if name in accepted
    }
    if "input_ids" not in inputs or not inputs["input_ids"].shape[1]:
        raise TraceError(
            f"{type(model).__name__}.forward takes no input_ids, or {type(tokenizer).__name__} makes none of a text. "
            "Give an example of the model's inputs instead."
        )
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :TARGET].contiguous()
    inputs |= _labels(model, inputs) if "labels" in accepted else {}
    generates = getattr(model, "can_generate", bool)()
    return {**inputs, "use_cache": True} if generates and "use_cache" in accepted else inputs


def _labels(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return labels that the model takes: a class for each row or token, by the shape of its logits; numbers where
    there is one class, or several are true at once."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    given = {name: value.to(device) for name, value in inputs.items()}
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        logits = getattr(model.eval()(**given), "logits", None)
    for module, mode in modes.items():
        module.training = mode
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        return {}
    several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    if logits.dim() == 2 and (several or logits.shape[1] == 1):
        return {"labels": torch.zeros(logits.shape if several else logits.shape[:1], dtype=logits.dtype)}
    return {"labels": torch.zeros(logits.shape[:-1], dtype=torch.long)}


def _is_text_tokenizer(example: object) -> bool:
    names = getattr(example, "model_input_names", None)
    return callable(example) and isinstance(names, list | tuple) and "input_ids" in names and _encodes(example)


def _encodes(example: object) -> bool:
    """Tell tokenizers from processors of several kinds of input, which hold one."""
    return hasattr(example, "convert_tokens_to_ids")


def _require_inputs(example: object) -> None:
    if isinstance(example, Mapping | tuple | Tensor):
        return
    if isinstance(example, Pass | str):
        raise TraceError('An example or a tokenizer comes before the methods: pg.tune(model, example, "lora{rank=8}").')
    hint = " A processor makes inputs of pictures or sounds: call it, and give what it returns."
    hint = hint if hasattr(example, "model_input_names") else ""
    raise TraceError(
        "The second argument of pg.tune is an example of the model's inputs (a dict, a tuple or a tensor), or a "
        f"tokenizer; got {type(example).__name__}.{hint}"
    )
