"""Tasks: which model is trained, how a row becomes tokens, and how a batch is made.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftgraph.errors import PeftGraphError
from peftgraph.experiments.examples import Label, Row
from peftgraph.experiments.settings import Settings
from peftgraph.model_folders.loading import first_line, read_config
from peftgraph.terminal.console import working

Encoded = dict[str, list[int]]
Batch = dict[str, Tensor]
IGNORED = -100  # a label that the loss leaves out


@dataclass
class Loaded:
    """A model that is going to be trained.

    Attributes:
        model: the model, in evaluation mode.
        new: the names of the parameters that its folder has no values of.
    """

    model: Any
    new: tuple[str, ...] = ()


@dataclass
class Task(ABC):
    """A kind of experiment.

    Attributes:
        settings: of the experiment.
        tokenizer: of the model.
        longest: the most tokens of a text.
        cut: how many texts were longer.
    """

    settings: Settings
    tokenizer: Any
    longest: int
    cut: int = field(default=0, init=False)
    word: ClassVar[str]
    metric: ClassVar[str]  # of an evaluation, as the Trainer names it
    title: ClassVar[str]  # of the metric
    rising: ClassVar[bool] = True  # whether more of it is better

    @abstractmethod
    def load(self) -> Loaded:
        """Load the model."""

    @abstractmethod
    def encode(self, row: Row) -> Encoded:
        """Return a row as tokens."""

    @abstractmethod
    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Return rows as the inputs of the Trainer's model."""

    def example(self, rows: Sequence[Encoded]) -> Batch:
        """Return the inputs that the model is traced with."""
        return self.collate(rows)

    def tokens(self, *texts: str, special: bool = True) -> list[int]:
        """Return the tokens of a text, or of a pair of texts, and count those that are cut."""
        ids = self.tokenizer(*texts, add_special_tokens=special)["input_ids"]
        if len(ids) <= self.longest:
            return ids
        self.cut += 1
        return self.tokenizer(*texts, add_special_tokens=special, truncation=True, max_length=self.longest)["input_ids"]

    def padded(self, ids: Sequence[Sequence[int]]) -> Batch:
        """Return tokens as a batch, padded on the right to the longest row."""
        fill = self.tokenizer.pad_token_id
        return {
            "input_ids": _pad(ids, 0 if fill is None else fill),
            "attention_mask": _pad([[1] * len(i) for i in ids], 0),
        }


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    padded_BS = torch.full((len(rows), max(map(len, rows))), fill)
    for place, row in enumerate(rows):
        padded_BS[place, : len(row)] = torch.tensor(row)
    return padded_BS


def load_as(cls: Any, settings: Settings, **options: Any) -> Loaded:
    """Load a model as a class of transformers, with the parameters that are new.

    Args:
        cls: such as AutoModelForCausalLM.
        settings: of the experiment.
        options: of `from_pretrained`.

    Raises:
        PeftGraphError: the folder's model cannot be loaded as one of that class.
    """
    config = read_config(settings.model)
    if type(config) not in cls._model_mapping:
        raise PeftGraphError(
            f"transformers has no {cls.__name__} of {config.model_type!r}, the model in {settings.model}."
        )
    try:
        with working(f"loading {settings.model}"):
            model, notes = cls.from_pretrained(
                str(settings.model), local_files_only=True, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, **options,
            )  # fmt: skip
    except Exception as error:  # damaged files surface as errors of safetensors, json or torch
        raise PeftGraphError(f"The weights in {settings.model} cannot be loaded: {first_line(error)}") from error
    new = {*notes["missing_keys"], *(name if isinstance(name, str) else name[0] for name in notes["mismatched_keys"])}
    lacking = sorted(name for name in new if name.startswith(f"{model.base_model_prefix}."))
    if lacking:
        raise PeftGraphError(f"The weights in {settings.model} lack {len(lacking)} tensors, {lacking[0]} first.")
    return Loaded(model.eval(), tuple(sorted(new)))


class Classification(Task):
    """Sequence classification: a text, or two, and a label. A head of the right size is made or used."""

    word, metric, title = "classification", "eval_accuracy", "accuracy"
    labels: Sequence[Label] = ()

    def load(self) -> Loaded:
        """Load the model with a head for the labels: its own where it knows them, else a new one."""
        from transformers import AutoModelForSequenceClassification

        names = [str(label) for label in self.labels]
        own = getattr(read_config(self.settings.model), "id2label", None) or {}
        known = [str(own[i]) for i in sorted(own)]
        numbers = all(isinstance(label, int) and 0 <= label < len(known) for label in self.labels)
        classifier = self._is_classifier()
        if classifier and (set(names) <= set(known) or numbers):
            self.indices = {
                label: label if isinstance(label, int) and numbers else known.index(str(label)) for label in self.labels
            }
            names = known
        else:
            self.indices = {label: i for i, label in enumerate(self.labels)}
        self.names = names
        options = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
        loaded = load_as(AutoModelForSequenceClassification, self.settings, **options)
        if loaded.model.config.pad_token_id is None and self.tokenizer.pad_token_id is not None:
            loaded.model.config.pad_token_id = self.tokenizer.pad_token_id  # a decoder classifies at the last token
        return loaded

    def _is_classifier(self) -> bool:
        names = getattr(read_config(self.settings.model), "architectures", None) or [""]
        return names[0].endswith("ForSequenceClassification")

    def encode(self, row: Row) -> Encoded:
        """Return a row as tokens and the index of its label."""
        assert row.label is not None
        return {"input_ids": self.tokens(*row.texts.values()), "label": [self.indices[row.label]]}

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Return rows as the model's inputs."""
        labels_B = torch.tensor([row["label"][0] for row in rows])
        return {**self.padded([row["input_ids"] for row in rows]), "labels": labels_B}


class Causal(Task):
    """Causal language modelling: of texts, or of completions of prompts, where the loss leaves the prompt out."""

    word, metric, title, rising = "causal", "eval_loss", "loss", False

    def load(self) -> Loaded:
        """Load the model.

        Raises:
            PeftGraphError: weights of it are missing, or its tokens see later ones.
        """
        from transformers import AutoModelForCausalLM

        loaded = load_as(AutoModelForCausalLM, self.settings)
        if loaded.new:
            raise PeftGraphError(f"The weights in {self.settings.model} lack {loaded.new[0]} of a language model.")
        ids_BS = torch.arange(3, 9).repeat(2, 1)
        ids_BS[1, -1] = 3
        with torch.no_grad():
            first, second = loaded.model(input_ids=ids_BS).logits[:, 0]
        if not torch.allclose(first, second):
            raise PeftGraphError(
                f"The tokens of {type(loaded.model).__name__} see later ones, so it is no causal model."
            )
        return loaded

    def encode(self, row: Row) -> Encoded:
        """Return a row as tokens and labels; a text ends with the token for the end.

        Raises:
            PeftGraphError: a prompt leaves no room for its completion.
        """
        end = self.tokenizer.eos_token_id
        prompt = self.tokenizer(row.texts["prompt"])["input_ids"] if "prompt" in row.texts else []
        if prompt and prompt[-1] == end:
            prompt = prompt[:-1]
        text = row.texts.get("completion", row.texts.get("text", ""))
        rest = self.tokenizer(text, add_special_tokens=not prompt)["input_ids"]
        if end is not None and (not rest or rest[-1] != end):
            rest = [*rest, end]
        ids, labels = [*prompt, *rest], [*[IGNORED] * len(prompt), *rest]
        if len(prompt) >= self.longest:
            raise PeftGraphError(
                f"Line {row.line}: its prompt has {len(prompt)} tokens, of at most {self.longest}; give a larger "
                "--length."
            )
        self.cut += len(ids) > self.longest
        return {"input_ids": ids[: self.longest], "labels": labels[: self.longest]}

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Return rows as the model's inputs."""
        return {
            **self.padded([row["input_ids"] for row in rows]),
            "labels": _pad([row["labels"] for row in rows], IGNORED),
        }

    def example(self, rows: Sequence[Encoded]) -> Batch:
        """Return inputs with the count that the Trainer divides the loss by."""
        return self.collate(rows) | {"num_items_in_batch": torch.tensor(float(sum(map(_learned, rows))))}


def _learned(row: Encoded) -> int:
    return sum(label != IGNORED for label in row["labels"][1:])


class Embedding(Task):
    """Embedding pairs: an anchor's vector is to be nearer to its positive's than to those of the batch's other rows."""

    word, metric, title = "embedding", "eval_recall", "recall at 1"

    def load(self) -> Loaded:
        """Load the bare model."""
        from transformers import AutoModel

        loaded = load_as(AutoModel, self.settings)
        if loaded.new:
            raise PeftGraphError(f"The weights in {self.settings.model} lack {loaded.new[0]}.")
        return loaded

    def encode(self, row: Row) -> Encoded:
        """Return the tokens of both texts."""
        return {name: self.tokens(row.texts[name]) for name in ("anchor", "positive")}

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Return rows as one batch of the encoder: all anchors, then all positives."""
        return self.padded([row[name] for name in ("anchor", "positive") for row in rows])


TASKS: Mapping[str, type[Task]] = {one.word: one for one in (Classification, Causal, Embedding)}
