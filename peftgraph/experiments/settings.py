"""Reads how an experiment is run: the options of the command line, and the table `[train]` of the recipe."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from peftgraph.errors import PeftGraphError
from peftgraph.rewrite.recipe_text import read_recipe
from peftgraph.utils.atomic_files import read_regular_file

Task = Literal["causal", "classification", "embedding"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an experiment is run. Each field is an option of `peftgraph train`, and a key of `[train]`.

    Attributes:
        model: a transformers folder with weights and tokenizer.
        data: the examples, a JSON object on each line.
        recipe: the passes.
        out: the folder that is written.
        task: what is learned; by default what the fields of the data say.
        eval_data: examples to evaluate on.
        eval_share: the share of `data` that is kept for evaluation, without `eval_data`.
        epochs: passes over the data.
        steps: optimiser steps, instead of epochs; 0 for none.
        batch: examples in a batch.
        accumulate: batches in a step.
        lr: the peak learning rate.
        weight_decay: of AdamW.
        warmup: the share of the steps in which the learning rate rises; it then falls linearly to 0.
        length: the most tokens of a text; longer ones are cut.
        checks: how often the evaluation part is measured and a checkpoint is written.
        seed: of the head, the adapter, the parts and the order of the batches.
        merge: whether the merged model is written too, where the recipe folds.
    """

    model: Path
    data: Path
    recipe: str
    out: Path
    task: str = ""
    eval_data: Path | None = None
    eval_share: float = 0.1
    epochs: float = 3.0
    steps: int = 0
    batch: int = 16
    accumulate: int = 1
    lr: float = 5e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    length: int = 256
    checks: int = 5
    seed: int = 0
    merge: bool = True

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            PeftGraphError: one does; the message names it.
        """
        self._require(self.task in ("", *TASKS), "task", f"is one of {', '.join(TASKS)}", self.task)
        for name in ("batch", "accumulate", "checks"):
            self._require(getattr(self, name) >= 1, name, "is at least 1", getattr(self, name))
        self._require(self.length >= 8, "length", "is at least 8 tokens", self.length)
        self._require(self.steps >= 0, "steps", "is a number of steps, or 0 to count epochs", self.steps)
        for name in ("epochs", "lr"):
            self._require(getattr(self, name) > 0, name, "is above 0", getattr(self, name))
        for name in ("eval_share", "warmup"):
            self._require(0 <= getattr(self, name) < 1, name, "is a share, from 0 to below 1", getattr(self, name))
        self._require(self.weight_decay >= 0, "weight_decay", "is not negative", self.weight_decay)

    def _require(self, good: bool, name: str, rule: str, value: object) -> None:
        if not good:
            raise PeftGraphError(f"{name} {rule}, got {value!r}.")

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON, with the content of the files that they name: what makes two runs the same."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("out", "merge")}
        document = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
        for name in ("data", "eval_data"):
            if plain[name] is not None:
                document[f"{name} (content)"] = hashlib.sha256(read_regular_file(plain[name])).hexdigest()
        document["recipe (content)"] = [f"{one.word} {json.dumps(dict(one.options))}" for one in read(self.recipe)]
        return document


def read(recipe: str) -> tuple[Any, ...]:
    """Return the passes of a recipe, as text."""
    return read_recipe(recipe).passes


def read_settings(recipe: str, given: Mapping[str, Any]) -> Settings:
    """Combine the options of the command line with the table `[train]` of a recipe; the command line comes first.

    Args:
        recipe: the path of a file, a spec, or the word of a pass.
        given: option -> value; None where the command line does not say it.

    Raises:
        PeftGraphError: the table has an unknown key or a value of another kind, or a needed option is missing.
    """
    text = read_recipe(recipe)
    kinds = get_type_hints(Settings)
    kinds.pop("recipe")
    found = {name: _converted(name, value, kinds, text.place) for name, value in text.train.items()}
    found |= {name: value for name, value in given.items() if value is not None}
    for name, how in (("model", "DIR"), ("data", "--data FILE"), ("out", "--out DIR")):
        if name not in found:
            where = f"{text.place} has no {name} under [train]" if text.place else "the recipe is no TOML file"
            raise PeftGraphError(f"{how} is missing, and {where}.")
    return Settings(recipe=recipe, **found)


def _converted(name: str, value: Any, kinds: Mapping[str, Any], place: str) -> Any:
    """Return the value of a key of `[train]`; a path is relative to the recipe's folder."""
    if name not in kinds:
        close = difflib.get_close_matches(name, list(kinds), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(kinds)}."
        raise PeftGraphError(f"{place}: [train] has no key {name!r}; {hint}")
    kind = kinds[name]
    if kind in (Path, Path | None) and isinstance(value, str):
        return Path(place).parent / value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, bool, str) and type(value) is kind:
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    raise PeftGraphError(f"{place}: [train] {name} is {words.get(kind, 'text')}, got {value!r}.")
