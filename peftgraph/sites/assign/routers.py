"""Routers: projections whose result chooses or weighs experts. They are neither up nor gate."""

from __future__ import annotations

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.projections import Projection

REACH = 40  # how many nodes a router's scores may pass before they choose


def find_routers(anatomy: Anatomy, taken: set[Projection]) -> set[Projection]:
    """Return the projections whose result selects or weights others: it reaches a top-k, or scales a wider value."""
    return {one for one in anatomy.projections if one not in taken and routes(anatomy, one)}


def routes(anatomy: Anatomy, candidate: Projection) -> fx.Node | None:
    """Return the node where the result selects or weights others; None if it does neither."""
    through = ops.LAYOUT | ops.CAST | ops.NONLINEAR | ops.SCALE | ops.MASKING | ops.DROPOUT | ops.REDUCTION
    todo, seen = [(candidate.output, False)], set[fx.Node]()
    while todo and len(seen) < REACH:
        here, weighs = todo.pop(0)
        for user in here.users:
            kind = ops.name(user)
            if kind in ops.CHOICE:
                return user if any(anatomy.flow.descends(join.node, user) for join in anatomy.joins) else None
            if weighs and kind == "mul" and _widens(anatomy, here, user):
                return user
            if user not in seen and kind in through and user not in anatomy.join_at:
                seen.add(user)
                squashed = kind in ops.SOFTMAX or (kind == "sigmoid" and candidate.width == 1)
                todo.append((user, weighs or squashed))
    return None


def _widens(anatomy: Anatomy, weight: fx.Node, product: fx.Node) -> bool:
    narrow, wide = anatomy.flow.shape(weight), anatomy.flow.shape(product)
    return bool(narrow) and narrow[-1] == 1 and wide[-1] > 1
