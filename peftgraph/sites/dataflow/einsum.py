"""einsum equations with every index spelled out: ellipses by letters of their own, a missing result by its rule."""

from __future__ import annotations

import string

import torch
from torch import fx


def operands(node: fx.Node) -> list[fx.Node]:
    inputs = node.args[1]
    return [one for one in inputs if isinstance(one, fx.Node)] if isinstance(inputs, (list, tuple)) else []


def letters(node: fx.Node) -> tuple[list[str], str] | None:
    """Return the index letters of an einsum: per operand, and of the result; None where it takes no plain equation."""
    equation = node.args[0]
    if not isinstance(equation, str):
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    values = [one.meta.get("val") for one in operands(node)]
    if len(terms) != len(values) or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    ranks = [value.dim() for value in values if isinstance(value, torch.Tensor)]
    unused = "".join(letter for letter in string.ascii_uppercase if letter not in equation)
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    shared = unused[: max(hidden)]  # aligned at the right, as in broadcasting
    spelled = [term.replace("...", shared[len(shared) - count :]) for term, count in zip(terms, hidden, strict=True)]
    if not arrow:
        names = "".join(spelled)
        right = shared + "".join(sorted(one for one in set(names) if names.count(one) == 1 and one not in shared))
    return spelled, right.replace("...", shared)
