"""Rows of keys and values in the layout of the model's own: heads, positions and features on the same axes.

Shapes: B batch, G heads of keys or values, L rows, D features of a head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.match import Match
from peftgraph.sites.site import Axes

aten = torch.ops.aten

HINT = (
    "A model that can also compute its attention by torch's scaled_dot_product_attention may be loaded that way "
    '(in transformers attn_implementation="sdpa").'
)


def axes_of(m: Match, port: str) -> Axes:
    """Return the meaning of the axes of an attention core's operand.

    Raises:
        PeftGraphError: the site is no attention core, or its layout of heads, positions and features is unknown.
    """
    if port not in m.site.ports:
        what = {"k": "keys", "v": "values"}.get(port, port)
        raise PeftGraphError(f"{m.site.id} is no attention core, so it has no {what}; choose attention.core.")
    if port not in m.site.axes:
        sizes = " x ".join(map(str, m.value(port).meta["val"].shape))
        raise PeftGraphError(
            f"It is not known which axes of %{m.port(port)} ({sizes}), {port} of {m.site.id}, hold heads, positions "
            f"and features, so no rows can be put beside its own. {HINT}"
        )
    return m.site.axes[port]


def size_of_head(m: Match, port: str, value: fx.Node) -> int:
    """Return the features of one head.

    Raises:
        PeftGraphError: their number is not fixed, as where the softmax is over features, not positions.
    """
    size: Any = 1
    for axis in _features(axes_of(m, port)):
        size = size * value.meta["val"].shape[axis]
    if not isinstance(size, int):
        raise PeftGraphError(f"A head of {m.site.id} has {size} features, which no row of its own length can have.")
    return size


def _features(axes: Axes) -> list[int]:
    return [axis for axis, word in enumerate(axes.words) if word == "d"]


def laid_out(op: Builder, rows: fx.Node, axes: Axes, like: fx.Node) -> fx.Node:
    """Arrange rows (1 or B, G, L, D) in the layout of `like`: for every batch entry, with heads repeated as there."""
    letters = [letter for word in axes.words for letter in word.strip("()").split()]
    features = [like.meta["val"].shape[axis] for axis in _features(axes)]
    value = rows if len(features) == 1 else op.call(aten.unflatten.int, rows, -1, features)
    sources = _sources(letters)
    used = [one for one in sources if one is not None]
    order = [one for one in range(value.meta["val"].dim()) if one not in used] + used
    if order != sorted(order):
        value = op.call(aten.permute.default, value, order)
    for _ in range(len(order) - len(used)):
        value = op.call(aten.select.int, value, 0, 0)
    for place, source in enumerate(sources):
        if source is None:
            value = op.call(aten.unsqueeze.default, value, place)
    value = op.call(aten.expand.default, value, _sizes(op, axes, like))
    for place, word in enumerate(axes.words):
        if word.startswith("("):
            value = op.call(aten.flatten.using_ints, value, place, place + 1)
    return value


def _sources(letters: Sequence[str]) -> list[int | None]:
    """Return, for each target axis, the corresponding axis of rows (B, G, L, D, ...); None for a new one."""
    known = {"b": 0, "h": 1, "t": 2, "d": 3}
    found: list[int | None] = []
    for i, letter in enumerate(letters):
        again = letters[:i].count(letter)
        own = letter in known and (again == 0 or letter == "d")
        found.append(known[letter] + again if own else None)
    return found


def _sizes(op: Builder, axes: Axes, like: fx.Node) -> list[Any]:
    """Return the sizes to expand rows to, one for each letter: batch and repeats as in `like`, -1 for the rest."""
    sizes: list[Any] = []
    for axis, word in enumerate(axes.words):
        size = like.meta["val"].shape[axis]
        if word.startswith("("):
            whole = size if isinstance(size, int) else op.call(aten.sym_size.int, like, axis)
            other = op.call(operator.floordiv, whole, axes.heads) if isinstance(whole, fx.Node) else whole // axes.heads
            sizes += [-1 if letter == "h" else other for letter in word.strip("()").split()]
        elif word == "b":
            sizes.append(size if isinstance(size, int) else op.call(aten.sym_size.int, like, axis))
        else:
            sizes.append(-1)
    return sizes


def each_by_head(op: Builder, value: fx.Node, axes: Axes, change: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Apply `change` to a value with axes in the order (B, H, S, F), and restore the original order."""
    words = list(axes.words)
    joined = next((place for place, word in enumerate(words) if word.startswith("(")), None)
    if joined is not None:
        letters = words[joined].strip("()").split()
        value = op.call(aten.unflatten.int, value, joined, [axes.heads if one == "h" else -1 for one in letters])
        words[joined : joined + 1] = letters
    alone = "h" not in words
    if alone:
        value = op.call(aten.unsqueeze.default, value, 0)
        words.insert(0, "h")
    order = [axis for axis, word in enumerate(words) if word not in ("h", "t", "d")]
    order += [axis for letter in "htd" for axis, word in enumerate(words) if word == letter]
    changed = order != sorted(order)
    value = change(op.call(aten.permute.default, value, order) if changed else value)
    if changed:
        value = op.call(aten.permute.default, value, [order.index(axis) for axis in range(len(order))])
    value = op.call(aten.squeeze.dim, value, 0) if alone else value
    return value if joined is None else op.call(aten.flatten.using_ints, value, joined, joined + 1)
