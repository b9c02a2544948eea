"""Who reads a stored tensor, through whatever only moves it or casts it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from peftgraph.sites.dataflow import ops


def readers(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """Yield the computing nodes that read one of some values, directly or through layout operations."""
    pending = list(nodes)
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if ops.name(user) in ops.LAYOUT | ops.CAST:
                pending.append(user)
            elif user.op != "placeholder":
                yield user
