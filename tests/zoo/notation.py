"""A short way to write a truth down by hand.

`attention("layers.0", q="qkv.weight[0:12]", k="qkv.weight[12:24]", ...)`: names are relative to the path; a slice gives
the output features that are the role's own, several of them are separated by commas; a plus joins several weights of
one role; a name behind a slash is not relative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import nn

from .entry import Entry, Expected, Group, Part, Truth

Example = Mapping[str, Any]


def attention(
    path: str,
    *,
    layer: int | None = None,
    kind: Literal["self", "cross"] | None = "self",
    layout: Literal["pre", "post", "sandwich"] | None = None,
    uses: int = 1,
    **roles: str,
) -> Expected:
    """An attention whose roles are q, k, v and o."""
    return Expected(path, tuple(_parts("attention", path, roles)), layer, kind, layout, uses)


def feedforward(
    path: str,
    *,
    layer: int | None = None,
    layout: Literal["pre", "post", "sandwich"] | None = None,
    uses: int = 1,
    **roles: str,
) -> Expected:
    """A feed-forward whose roles are up, gate and down."""
    return Expected(path, tuple(_parts("ffn", path, roles)), layer, None, layout, uses)


def _parts(prefix: str, path: str, roles: Mapping[str, str]) -> Iterator[Part]:
    for role, text in roles.items():
        for one in text.split("+"):
            name, _, window = one.strip().partition("[")
            full = f"{path}.{name}" if path and not name.startswith("/") else name.removeprefix("/")
            yield Part(f"{prefix}.{role}", full, _columns(window.removesuffix("]")))


def _columns(window: str) -> frozenset[int] | None:
    """The features of "0:4,8:12"."""
    if not window:
        return None
    runs = [run.split(":") for run in window.split(",")]
    return frozenset(i for start, stop in runs for i in range(int(start), int(stop)))


def thirds(weight: str, width: int) -> dict[str, str]:
    """q, k and v one after the other in one weight."""
    return {role: f"{weight}[{i * width}:{(i + 1) * width}]" for i, role in enumerate("qkv")}


def entry(
    name: str,
    group: Group,
    build: Callable[[], nn.Module],
    example: Callable[[], Example],
    truth: Truth | Callable[[nn.Module], Truth],
) -> Entry:
    """An entry whose example needs no look at the model."""

    def told(model: nn.Module, _: Example) -> Truth:
        return truth if isinstance(truth, Truth) else truth(model)

    return Entry(name, group, build, lambda _: example(), told)
