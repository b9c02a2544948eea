"""Norms: the operators, and hand-written ones (x times the inverse root of a reduced statistic of x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import fx

from peftgraph.sites.dataflow import ops
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.site import NearMiss

ROOTS = ops.words("rsqrt sqrt pow var std linalg_vector_norm norm var_mean std_mean reciprocal")
CONDITIONS: Final = (
    "a multiplication or division of a signal",
    "a second factor that depends on the first",
    "one factor for each row (the last axis reduced)",
    "a reduction and a root of the first factor alone",
)
STATISTIC = ops.words("add mul div pow square abs sub clamp clamp_min clamp_max expand expand_as getitem maximum")


@dataclass(frozen=True, eq=False)
class Norm:
    node: fx.Node
    input: fx.Node
    output: fx.Node
    weight: str | None
    bias: str | None
    axis: int = -1  # the (last) axis over which it takes its statistics


def find_norms(flow: Flow) -> list[Norm]:
    found: list[Norm] = []
    for node in flow.nodes:
        if ops.name(node) in ops.NORM:
            found.append(_operator(flow, node))
        elif ops.name(node) in ("mul", "div"):
            norm = _handwritten(flow, node)
            if norm is not None:
                found.append(norm)
    return found


def _operator(flow: Flow, node: fx.Node) -> Norm:
    kind = ops.name(node)
    batch = kind in ("batch_norm", "_native_batch_norm_legit", "_batch_norm_impl_index", "instance_norm")
    position = 1 if batch else 2
    weight = ops.operand(node, position, "weight")
    bias = None if "rms" in kind else ops.operand(node, position + 1, "bias")
    axis = 1 if kind in ops.IMAGE_NORM else -1
    return Norm(node, flow.operands(node)[0], node, _name(flow, weight), _name(flow, bias), axis)


def _name(flow: Flow, node: fx.Node | None) -> str | None:
    leaf = None if node is None else flow.leaf(node)
    return None if leaf is None else str(leaf.target)


def _handwritten(flow: Flow, node: fx.Node) -> Norm | None:
    """Recognise x * rsqrt(mean(x^2)), x / sqrt(var(x)), (x - mean(x)) / ..., starting from the multiplication."""
    sides = [one for one in flow.operands(node) if flow.signal(one) and not flow.constant(one)]
    if len(sides) != 2 or (ops.name(node) == "div" and node.args[0] is not sides[0]):
        return None
    for x, statistic in (sides, sides[::-1]) if ops.name(node) == "mul" else (sides,):
        axis = _reduced(flow, x, statistic)
        if axis is None:
            continue
        centre = _centred(flow, x)
        if _statistic_of(flow, statistic, _bare(flow, centre)):
            norm = _with_affine(flow, node, centre, axis)
            return norm if axis == -1 or norm.weight is not None else None  # over channels, where a gain tells them
    return None


def near_norm(flow: Flow, node: fx.Node) -> NearMiss | None:
    """Return how close a multiplication or a division is to a norm; None for every other node, and for a norm."""
    signals = [one for one in flow.operands(node) if flow.signal(one)]
    if ops.name(node) not in ("mul", "div") or not signals or _handwritten(flow, node) is not None:
        return None
    sides = [one for one in signals if not flow.constant(one)]
    others = [one for one in flow.operands(node) if one not in sides]
    if len(sides) != 2:
        leaf = flow.leaf(others[0]) if others else None
        found = f"@{leaf.target}, which does not depend on it" if leaf else "a constant"
        return NearMiss.at("norm", node, CONDITIONS, 1, found, *flow.operands(node))
    for x, statistic in (sides, sides[::-1]):
        if _reduced(flow, x, statistic) is not None:
            centre = _centred(flow, flow.uncast(x))
            if not flow.descends(statistic, centre):
                found = f"%{statistic.name}, which does not come from %{centre.name}"
                return NearMiss.at("norm", node, CONDITIONS, 1, found, *sides)
            way = flow.between(centre, statistic)
            shown = ", ".join(dict.fromkeys(ops.name(one) for one in (*way, statistic))) or "nothing"
            return NearMiss.at(
                "norm",
                node,
                CONDITIONS,
                3,
                f"{shown} on the way from %{centre.name} to %{statistic.name}",
                *way,
                statistic,
            )
    return NearMiss.at(
        "norm", node, CONDITIONS, 2, f"%{sides[0].name} and %{sides[1].name}, neither of them reduced", *sides
    )


def _reduced(flow: Flow, x: fx.Node, statistic: fx.Node) -> int | None:
    """Return the axis over which a statistic of x was taken: the last, or the one of channels of [batch, channels,
    ...]."""
    wide, narrow = flow.shape(x), flow.shape(statistic)
    if len(wide) != len(narrow) or not wide:
        return None
    if wide[-1] > 1 and (narrow[-1] == 1 or ops.name(statistic) in ("expand", "expand_as")):
        return -1
    return 1 if len(wide) > 2 and wide[1] > 1 and narrow == (wide[0], 1, *wide[2:]) else None


def _bare(flow: Flow, node: fx.Node) -> fx.Node:
    """Return the value before casts, layout, dropout and scaling by a number."""
    while (source := flow.source(node)) is not None and not _by_vector(flow, node):
        node = source
    return node


def _by_vector(flow: Flow, node: fx.Node) -> bool:
    return ops.name(node) in ops.SCALE and len(flow.operands(node)) > 1


def _centred(flow: Flow, x: fx.Node) -> fx.Node:
    """Return the value whose mean is subtracted in x, or x itself; casts removed."""
    difference = _bare(flow, x)
    if ops.name(difference) == "sub":
        operands = flow.operands(difference)
        if len(operands) == 2 and ops.name(_bare(flow, operands[1])) == "mean":
            return flow.uncast(operands[0])
    return flow.uncast(x)


def _statistic_of(flow: Flow, statistic: fx.Node, x: fx.Node) -> bool:
    """Walk back from the statistic to x: a root and a reduction must be on the way, and nothing else."""
    rooted = reduced = False
    allowed = ROOTS | STATISTIC | ops.REDUCTION | ops.CAST | ops.LAYOUT | ops.DROPOUT
    todo, seen = [statistic], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or node is x or flow.constant(node):
            continue
        seen.add(node)
        kind = ops.name(node)
        rooted |= kind in ROOTS
        reduced |= kind in ops.REDUCTION
        if kind not in allowed or not flow.descends(node, x):
            return False
        todo.extend(flow.operands(node))
    return rooted and reduced


def _with_affine(flow: Flow, node: fx.Node, x: fx.Node, axis: int) -> Norm:
    """Extend a bare normalisation over its casts, its gain and its bias."""
    weight: str | None = None
    bias: str | None = None
    output = here = node
    while len(here.users) == 1:
        here = next(iter(here.users))
        addend = _affine(flow, here)
        if addend is None:
            if flow.source(here) is None or _by_vector(flow, here):
                break
            continue  # a cast or the like, which belongs to the norm if its gain follows
        if flow.shape(here) != flow.shape(node):
            break
        if not _along(flow, addend, flow.shape(node), axis):
            break
        if ops.name(here) == "mul" and weight is None:
            weight = _name(flow, addend)
        elif ops.name(here) == "add" and bias is None and flow.shape(addend):
            bias = _name(flow, addend)
        else:
            break
        output = here
    return Norm(node, x, output, weight, bias, axis)


def _along(flow: Flow, vector: fx.Node, shape: tuple[int, ...], axis: int) -> bool:
    """Tell whether a vector stands along an axis of a value, or is the same everywhere."""
    sizes = flow.shape(vector)
    wide = [i - len(sizes) for i, size in enumerate(sizes) if size > 1]
    return wide in ([], [axis if axis < 0 else axis - len(shape)])


def _affine(flow: Flow, node: fx.Node) -> fx.Node | None:
    """Return the stored vector that a value is multiplied by, or that is added to it."""
    if ops.name(node) != "add" and not (ops.name(node) == "mul" and flow.scaling(node)):
        return None
    stored = [one for one in flow.operands(node) if flow.constant(one) and flow.leaf(one) is not None]
    return stored[0] if len(stored) == 1 else None
