"""Reads the examples of an experiment from a file with a JSON object on each line, and their labels.

Nothing here imports torch, so that a mistake in the file is told at once, with its line.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftgraph.errors import PeftGraphError, shortened
from peftgraph.experiments.settings import Settings
from peftgraph.utils.atomic_files import read_regular_file
from peftgraph.utils.strict_json import parse_json

# Task -> the fields of its rows, in each form that it takes. Further fields are not read.
FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "classification": (("text", "label"),),
    "embedding": (("anchor", "positive"),),
    "causal": (("prompt", "completion"), ("text",)),
}
OPTIONAL = {"classification": ("text_pair",)}
Label = str | int


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        line: its number in the file.
        texts: field -> text.
        label: of a classification.
    """

    line: int
    texts: Mapping[str, str]
    label: Label | None = None


@dataclass(frozen=True)
class Examples:
    """The examples of an experiment.

    Attributes:
        task: what they teach.
        train: to train on.
        evaluation: to evaluate on; none of them is trained on.
        labels: the labels of a classification, in order.
        files: part -> the file that its rows are in, for messages.
    """

    task: str
    train: Sequence[Row]
    evaluation: Sequence[Row]
    labels: Sequence[Label] = ()
    files: Mapping[str, Path] = field(default_factory=dict)


def read_examples(settings: Settings) -> Examples:
    """Read the examples, and part them.

    Raises:
        PeftGraphError: a file or a line cannot be read, lacks a field, or has a label that means nothing; the message
            says which line.
    """
    first = _documents(settings.data)
    task = settings.task or _guessed(first[0][1], settings.data)
    rows = [_row(line, document, task, settings.data) for line, document in first]
    labels = label_names(rows, settings.data) if task == "classification" else ()
    if settings.eval_data is not None:
        others = [_row(line, document, task, settings.eval_data) for line, document in _documents(settings.eval_data)]
        _check_known(others, labels, settings.eval_data)
        return Examples(task, rows, others, labels, {"train": settings.data, "evaluation": settings.eval_data})
    train, evaluation = _parted(rows, settings)
    return Examples(task, train, evaluation, labels, dict.fromkeys(("train", "evaluation"), settings.data))


def _parted(rows: Sequence[Row], settings: Settings) -> tuple[list[Row], list[Row]]:
    """Keep a share of the rows for evaluation, drawn at random, but the last one of no label.

    Raises:
        PeftGraphError: the share is no row, or all.
    """
    wanted = round(settings.eval_share * len(rows))
    left = Counter(row.label for row in rows)
    train: list[Row] = []
    evaluation: list[Row] = []
    for row in random.Random(settings.seed).sample(rows, len(rows)):
        if len(evaluation) < wanted and left[row.label] > 1:
            left[row.label] -= 1
            evaluation.append(row)
        else:
            train.append(row)
    if settings.eval_share and not evaluation:
        raise PeftGraphError(
            f"{settings.data} has {len(rows)} rows, and a share of {settings.eval_share:g} of them is none to evaluate "
            "on. Give more rows or a larger --eval-share, or --eval-share 0 to train without an evaluation."
        )
    return train, evaluation


def label_names(rows: Sequence[Row], path: Path) -> tuple[Label, ...]:
    """Return the labels of some rows: texts in alphabetical order, or numbers in theirs.

    Raises:
        PeftGraphError: some are texts and some numbers, or all are the same.
    """
    texts = next((row for row in rows if isinstance(row.label, str)), None)
    numbers = next((row for row in rows if isinstance(row.label, int)), None)
    if texts is not None and numbers is not None:
        raise PeftGraphError(
            f"{path}: labels are texts or whole numbers, not both: line {texts.line} has {texts.label!r}, line "
            f"{numbers.line} has {numbers.label!r}."
        )
    found = Counter(row.label for row in rows)
    if len(found) < 2:
        raise PeftGraphError(
            f"{path}: every row has the label {next(iter(found))!r}, so there is nothing to tell apart."
        )
    return tuple(sorted(label for label in found if label is not None))


def _check_known(rows: Sequence[Row], labels: Sequence[Label], path: Path) -> None:
    """Refuse rows to evaluate on whose label no row to train on has."""
    wrong = next((row for row in rows if labels and row.label not in labels), None)
    if wrong is not None:
        raise PeftGraphError(
            f"{path}, line {wrong.line}: the label {wrong.label!r} is on no row to train on; those have "
            f"{shortened(', '.join(map(repr, labels)))}."
        )


def _documents(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a file with their lines."""
    try:
        text = read_regular_file(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise PeftGraphError(f"{path} cannot be read: {error}") from None
    found: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise PeftGraphError(f"{path}, line {number} is no JSON: {error}. {shortened(line)}") from None
        if not isinstance(document, dict):
            raise PeftGraphError(f"{path}, line {number} is no JSON object: {shortened(line)}")
        found.append((number, document))
    if not found:
        raise PeftGraphError(f"{path} has no rows.")
    return found


def _guessed(document: Mapping[str, Any], path: Path) -> str:
    """Return the task that the fields of a row say."""
    for task, forms in FORMS.items():
        if any(set(form) <= document.keys() for form in forms):
            return task
    known = "; ".join(f"{task}: {' or '.join(map(_fields, forms))}" for task, forms in FORMS.items())
    raise PeftGraphError(f"{path}: the fields of its first row, {_fields(tuple(document))}, fit no task. {known}.")


def _fields(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _row(line: int, document: Mapping[str, Any], task: str, path: Path) -> Row:
    forms = FORMS[task]
    form = next((form for form in forms if set(form) <= document.keys()), None)
    if form is None:
        wanted = " or ".join(map(_fields, forms))
        raise PeftGraphError(
            f"{path}, line {line}: a row of {task} has {wanted}; this one has {_fields(tuple(document))}."
        )
    texts: dict[str, str] = {}
    for name in (*form, *(name for name in OPTIONAL.get(task, ()) if name in document)):
        value = document[name]
        if name == "label":
            continue
        if not isinstance(value, str) or not value.strip():
            raise PeftGraphError(
                f"{path}, line {line}: {name!r} must be text that is not empty, got {shortened(repr(value))}."
            )
        texts[name] = value
    label = document.get("label") if "label" in form else None
    if "label" in form and (not isinstance(label, str | int) or isinstance(label, bool)):
        raise PeftGraphError(f"{path}, line {line}: a label is text or a whole number, got {shortened(repr(label))}.")
    return Row(line, texts, label)
