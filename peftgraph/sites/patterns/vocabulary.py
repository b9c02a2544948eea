"""The words of patterns: operators by their bare aten names, classes of operators, and recognised wholes."""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Final

from peftgraph.errors import PeftGraphError
from peftgraph.sites.dataflow import ops

# A word that stands for any of several operators.
CLASSES: Final = {
    "nonlinear": ops.NONLINEAR,
    "layout": ops.LAYOUT,
    "cast": ops.CAST,
    "dropout": ops.DROPOUT,
    "reduction": ops.REDUCTION,
    "conv": ops.CONV,
    "pooling": ops.POOLING,
    "sdpa": ops.SDPA,
    "softmax": ops.SOFTMAX,
}

# A word that stands for a value which other rooms recognise in every spelling, and what it reads.
WHOLES: Final = {"projection": ("x",), "norm": ("x",), "attention": ("q", "k", "v")}

# Words that are terms by themselves, and those that conditions and selectors need.
RESERVED: Final = frozenset({"_", "weight", "number", "true", "false", "none", "size", "where"})

COMMUTATIVE: Final = ops.words(
    "add mul multiply maximum minimum eq ne logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor"
)
IDENTIFIER: Final = re.compile(r"[A-Za-z_]\w*")


def is_operator(word: str) -> bool:
    """Tell whether a word names an operator, a class of operators or a whole."""
    if word in CLASSES or word in WHOLES or word == "getitem":
        return True
    import torch

    return not word.startswith("__") and (hasattr(torch.ops.aten, word) or word in _registered())


def check_operator(word: str) -> None:
    """Refuse a word that names no operator.

    Raises:
        PeftGraphError: it names none; the message suggests the nearest that does.
    """
    if not is_operator(word):
        known = {*CLASSES, *WHOLES, *_registered()}
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PeftGraphError(
            f"there is no operator {word!r}{hint} Operators go by their bare aten names (linear, mul, softmax); "
            f"classes are {', '.join((*CLASSES, *WHOLES))}"
        )


def operators(word: str) -> frozenset[str] | None:
    """Return the operators that a word stands for; None for a whole."""
    return None if word in WHOLES else CLASSES.get(word, frozenset({word}))


@cache
def _registered() -> frozenset[str]:
    """Return the bare names of all operators that are registered now, of other libraries too."""
    import torch

    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name.partition("::")[2].partition(".")[0].rstrip("_") for name in names)
