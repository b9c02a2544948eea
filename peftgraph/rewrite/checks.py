"""Checks what a rule's delta, join and gate return, so that a mistake in a pass is told by the pass, site and port."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx

from peftgraph.errors import PeftGraphError
from peftgraph.rewrite.joins import Delta, Join
from peftgraph.rewrite.match import Match
from peftgraph.sites.dataflow.flow import hint
from peftgraph.sites.ports import PORTS


def check_join(maker: str, join: object) -> None:
    """Refuse a `Rule.join` that is no join.

    Raises:
        PeftGraphError: it is none; the message names the pass.
    """
    if not isinstance(join, Join):
        raise PeftGraphError(
            f"{maker}: the join of a rule must be a peftgraph.authoring.Join such as Add(), got {join!r}."
        )


def check_delta(maker: str, m: Match, delta: object, what: str = "delta") -> Delta:
    """Check the form of a delta and return it.

    Raises:
        PeftGraphError: it is neither a node nor a mapping from ports to nodes.
    """
    parts = delta.values() if isinstance(delta, Mapping) and delta else [delta]
    wrong = [part for part in parts if not isinstance(part, fx.Node)]
    if wrong:
        raise PeftGraphError(
            f"{maker} at {m.site.id}: {what} must be a node, or a mapping from ports to nodes, got {wrong[0]!r}."
        )
    return cast("Delta", delta)


def check_values(maker: str, m: Match, join: Join, values: object) -> Mapping[str, fx.Node]:
    """Check the new values of a join and return them.

    Raises:
        PeftGraphError: it returns no mapping, a port that the site does not have, or a value whose sizes or kind of
            dtype differ from the replaced one's.
    """
    told = f"{maker} at {m.site.id}: {type(join).__name__}.combine"
    if not isinstance(values, Mapping) or not all(isinstance(value, fx.Node) for value in values.values()):
        raise PeftGraphError(f"{told} must return a mapping from ports to nodes, got {values!r}.")
    for port, new in values.items():
        if not (isinstance(port, str) and m.has(port)):
            raise PeftGraphError(
                f"{told} returns a value for the port {port!r}, which {m.site.id} does not have; it has "
                f"{', '.join(m.site.ports) or 'a weight alone'}."
            )
        broadcasts = port in PORTS and PORTS[port].broadcasts
        _check_value(f"{told} returns for the port {port!r}", join, m.value(port), new, broadcasts)
    return values


def check_gated(maker: str, m: Match, join: Join, delta: Delta, gate: fx.Node, gated: object) -> Delta:
    """Check a gated delta and return it.

    Raises:
        PeftGraphError: it has other ports than the delta, or other sizes than the delta times the gate.
    """
    told = f"{maker} at {m.site.id}: {type(join).__name__}.gate"
    found = _parts(check_delta(maker, m, gated, f"what {type(join).__name__}.gate returns"), join)
    wanted = _parts(delta, join)
    if found.keys() != wanted.keys():
        raise PeftGraphError(f"{told} returns {', '.join(found)}, and the delta is for {', '.join(wanted)}.")
    for port, part in wanted.items():
        sizes = list(torch.broadcast_shapes(_sizes(part.meta["val"]), _sizes(gate.meta["val"])))
        if _sizes(found[port].meta["val"]) not in (sizes, _sizes(part.meta["val"])):
            raise PeftGraphError(
                f"{told} returns {_told(found[port])} for the port {port!r}, and the delta is {_told(part)}."
            )
    return cast("Delta", gated)


def _parts(delta: Delta, join: Join) -> Mapping[str, fx.Node]:
    return {join.port: delta} if isinstance(delta, fx.Node) else delta


def _check_value(told: str, join: Join, old: fx.Node, new: fx.Node, broadcasts: bool) -> None:
    a, b = old.meta["val"], new.meta["val"]
    if not isinstance(a, Tensor):
        return
    if not isinstance(b, Tensor):
        raise PeftGraphError(f"{told} no tensor, and the value there is {_told(old)}.")
    if a.dtype.is_floating_point != b.dtype.is_floating_point or (a.dtype == torch.bool) != (b.dtype == torch.bool):
        raise PeftGraphError(f"{told} {b.dtype}, and the value there is {a.dtype}.")
    fits = _sizes(a) == _sizes(b) or (broadcasts and _broadcasts_to(_sizes(a), _sizes(b)))
    if not (join.resizes or fits):
        raise PeftGraphError(
            f"{told} {_told(new)}, and the value there is {_told(old)}. A join whose values have other sizes says "
            "resizes = True."
        )


def _broadcasts_to(small: list[int], large: list[int]) -> bool:
    """Tell whether a value of the sizes `small` can be expanded to the sizes `large`."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(a in (1, b) for a, b in pairs)


def _sizes(value: Tensor) -> list[int]:
    """Return the sizes of a value, with the traced example's numbers for symbols."""
    return [size if isinstance(size, int) else hint(size) for size in value.shape]


def _told(node: fx.Node) -> str:
    return " x ".join(map(str, node.meta["val"].shape)) or "a number"
