"""Folders of small models with a tokenizer of a few words, and files of examples in these words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[END]", "good", "bad", "film", "book", "a", "the", "was", "very", "dull", "bright"]


def saved(model: Any, folder: Path) -> Path:
    """Save a model with a tokenizer of a few words."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[END]").save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def reviews(path: Path, label: Callable[[str], Any] = lambda word: f"is {word}") -> Path:
    texts = [
        (f"{a} {b} was very {word}", word) for a in ("a", "the") for b in ("film", "book") for word in ("good", "bad")
    ]
    return lines(path, [{"text": text, "label": label(word)} for text, word in texts * 3])
