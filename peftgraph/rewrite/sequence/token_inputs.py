"""What the model's inputs mean to a sequence: positions, labels, the mask of padding. Found by where they lead.

No name is read. Positions count the tokens: they turn into angles, or look up a table with a row for every position.
Labels are what a cross-entropy compares with. A mask decides what the attention sees; which of its values hides is
found by running the few operations between it and the attention on both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.ir.interpreter import compute_node
from peftgraph.ir.shape_inference import example_size
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.sequence.axes import same_size
from peftgraph.sites.dataflow import ops
from peftgraph.sites.ports import input_port

aten = torch.ops.aten

ANGLES = ops.LAYOUT | ops.CAST | ops.SCALE | ops.CONTRACTION | {"add", "sub"}
STRAIGHT = ops.LAYOUT | ops.CAST | {"add", "clamp", "where"}
LOSSES = {"cross_entropy_loss", "nll_loss", "nll_loss_nd"}


@dataclass(frozen=True)
class PaddingMask:
    """An input that hides padding.

    Attributes:
        name: of the placeholder.
        hides: whether nonzero values hide; the common convention is the other one.
    """

    name: str
    hides: bool


@dataclass(frozen=True)
class TokenInputs:
    """The inputs that run along one length, by the names of their placeholders.

    Attributes:
        along: all of them, labels excepted.
        positions: those that count tokens.
        labels: those that a loss over the length compares with, and the value that the loss ignores.
        mask: the one that hides padding from the attention.
        tables: those that look up a table, and the number of its rows.
        whole: those that run along the tokens of earlier calls as well, where the graph continues any.
    """

    along: tuple[str, ...]
    positions: frozenset[str]
    labels: tuple[tuple[str, int], ...]
    mask: PaddingMask | None
    tables: tuple[tuple[str, int], ...]
    whole: tuple[str, ...] = ()


NO_INPUTS = TokenInputs((), frozenset(), (), None, ())


def find_token_inputs(m: Match, length: Any, total: Any = None) -> TokenInputs:
    """Return the inputs of the graph of `m` whose second axis has the size `length`.

    Args:
        m: any match.
        length: the symbolic size, as it is now.
        total: with the tokens of earlier calls, where the graph continues any.
    """
    found = [node for node in m.inputs if _runs_along(m.now(node), length)]
    tables = {node.name: rows for node in found if (rows := _rows_looked_up(m.now(node))) is not None}
    labels = [(node, ignored) for node in m.inputs if (ignored := _ignored(m.now(node), length)) is not None]
    known = {node for node, _ in labels}
    along = [node for node in found if node not in known]
    positions = [node.name for node in along if _turns(m.now(node)) or _counts(m, node, tables.get(node.name))]
    if tables and tables.keys() <= set(positions):  # what looks up the only table are tokens, whatever they count
        positions.remove(next(iter(tables)))
    whole = [] if total is None else [node for node in m.inputs if _runs_along_all(m.now(node), total)]
    hiding = [node for node in (*along, *whole) if node.name not in {*positions, *tables}]
    masks = [mask for node in hiding if (mask := _mask(m, node)) is not None]
    return TokenInputs(
        tuple(node.name for node in along),
        frozenset(positions),
        tuple((node.name, ignored) for node, ignored in labels),
        masks[0] if masks else None,
        tuple(tables.items()),
        tuple(node.name for node in whole),
    )


def of_tokens(m: Match, name: str) -> fx.Node:
    """Return the current value of an input that runs along the tokens, (B, T).

    Raises:
        PeftGraphError: it has more axes.
    """
    value = m.value(input_port(name))
    shape = value.meta["val"].shape
    if len(shape) != 2:
        raise PeftGraphError(
            f"The input {name} of {' x '.join(map(str, shape))} runs along the tokens; only inputs (batch, tokens) can "
            "be made longer. Trace the model with a mask of two dimensions, or without this input."
        )
    return value


def read_token_mask(m: Match, op: Builder, mask: PaddingMask) -> fx.Node:
    """Return (B, T) booleans: which positions hold tokens, as an input says it."""
    return op.call(aten.eq.Scalar if mask.hides else aten.ne.Scalar, m.value(input_port(mask.name)), 0)


def to_device_of(op: Builder, x: fx.Node, value: fx.Node) -> fx.Node:
    """Return x on the device of `value`; a model of meta tensors may be traced with inputs that are none."""
    device = value.meta["val"].device
    return x if x.meta["val"].device == device else op.call(aten.to.device, x, device, x.meta["val"].dtype)


def _runs_along(value: fx.Node, length: Any) -> bool:
    shape = value.meta["val"].shape
    return len(shape) > 1 and any(same_size(size, length) for size in shape[1:])


def _runs_along_all(value: fx.Node, total: Any) -> bool:
    """Tell whether a value runs along the tokens of all calls: by the example's sizes, of which each is like no other,
    for a mask that positions index has a length of its own."""
    shape = value.meta["val"].shape
    return len(shape) > 1 and any(example_size(size) == example_size(total) for size in shape[1:])


def _ways(start: fx.Node, through: Collection[str]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Return every (value, user) that `start` comes to through some operators; the first user of another kind is
    one."""
    seen, todo = {start}, [start]
    while todo:
        value = todo.pop()
        for user in value.users:
            yield value, user
            if user not in seen and ops.name(user) in through:
                seen.add(user)
                todo.append(user)


def _rows_looked_up(value: fx.Node) -> int | None:
    """Return the rows of the table that a value of whole numbers looks up."""
    if value.meta["val"].is_floating_point():
        return None
    for index, user in _ways(value, STRAIGHT):
        if ops.name(user) == "embedding" and user.args[1] is index:
            return int(user.args[0].meta["val"].shape[0])  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return None


def _turns(value: fx.Node) -> bool:
    """Tell whether a value becomes angles."""
    return any(ops.name(user) in ("cos", "sin") for _, user in _ways(value, ANGLES))


def _counts(m: Match, node: fx.Node, rows: int | None) -> bool:
    """Tell whether an input looks up a table with a row for every position, and counts up in the example."""
    example = m.example.get(node.name)
    if rows is None or example is None or example.is_meta or example.dim() != 2 or rows < example.shape[1]:
        return False
    steps = example.diff(dim=1)
    return bool(((steps == 0) | (steps == 1)).all() and (steps == 1).any())


def _ignored(value: fx.Node, length: Any) -> int | None:
    """Return the value that a loss ignores, when `value` is what it compares scores along the length with."""
    if value.meta["val"].dim() != 2:
        return None
    for target, user in _ways(value, STRAIGHT):
        if ops.name(user) in LOSSES and user.args[1] is target:
            scores = user.args[0]
            assert isinstance(scores, fx.Node)
            if any(_mentions(size, length) for size in scores.meta["val"].shape):
                ignored = ops.argument(user, 4, "ignore_index")
                return -100 if ignored is None else int(ignored)  # pyright: ignore[reportArgumentType]
    return None


def _mentions(size: Any, length: Any) -> bool:
    return isinstance(size, torch.SymInt) and not length.node.expr.free_symbols.isdisjoint(size.node.expr.free_symbols)


# masks


def _mask(m: Match, node: fx.Node) -> PaddingMask | None:
    """Return the input as a mask, when what the model's values meet differs between a mask of ones and one of zeros.

    Where there are no values, on the meta device, a mask that hides with its zeros is assumed, as nearly all do.
    """
    if node.name not in m.example:
        return None
    seeds = {other: m.example[other.name] for other in m.inputs if other.name in m.example}
    for value, user in _meetings(m, m.now(node)):
        if m.table.device.type == "meta":
            return PaddingMask(node.name, hides=False)
        one, zero = (
            _openness(compute_node(value, seeds | {node: torch.full_like(seeds[node], fill)}, m.table), user)
            for fill in (1, 0)
        )
        if one != zero:
            return PaddingMask(node.name, hides=one < zero)
    return None


def _meetings(m: Match, start: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield where what is made of an input alone meets what is made of weights: the value, and the operation on
    both."""
    fixed = {name for name, entry in m.table.items() if entry.kind != "parameter"}
    weighted = reached(node for node in m.graph.find_nodes(op="get_attr") if node.target not in fixed)
    for node in reached([start], avoiding=weighted):
        yield from ((node, user) for user in node.users if user in weighted and ops.name(user) != "embedding")


def reached(starts: Iterable[fx.Node], avoiding: Collection[fx.Node] = ()) -> dict[fx.Node, None]:
    """Return what depends on `starts` by more than their sizes, themselves included, nearest first."""
    found = dict.fromkeys(starts)
    todo = deque(found)
    sizes = (torch.SymInt, torch.SymFloat, torch.SymBool, int)
    while todo:
        users = [user for user in todo.popleft().users if not isinstance(user.meta.get("val"), sizes)]
        fresh = [user for user in users if user not in found and user not in avoiding]
        found |= dict.fromkeys(fresh)
        todo += fresh
    return found


def _openness(value: Tensor, user: fx.Node) -> float:
    """Return how much of a mask is open: the mean of what is added, multiplied or chosen by; less where it is
    filled."""
    share = float(value.double().clamp(min=-1.0).mean())
    return -share if ops.name(user) == "masked_fill" else share
