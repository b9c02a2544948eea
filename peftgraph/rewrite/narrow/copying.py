"""Copies what lies between values of a graph at a width R times smaller, with parameters of its own.

What depends on the start is copied call by call. Stored parameters become new ones, narrow on the axes that face
features. What depends on neither, such as a mask, is read as it is. A table that is computed beside the stream faces
features or does not: the first choice that the reading call takes decides, with all of its axes tried before narrow
ones. A narrow table of constants (rotary frequencies) is every R-th entry of the base's, which for angles are those of
a head that is R times smaller.
Shapes: R the reduction.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.ir.dead_code import writes_in_place
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.narrow.sizes import Misfit, Scaling
from peftgraph.rewrite.narrow.stacks import base_nodes, operands_of
from peftgraph.rewrite.sequence.axes import END
from peftgraph.sites.dataflow import ops

aten = torch.ops.aten

CREATED = ops.words("arange linspace zeros ones full empty eye")
MEANING = ("follows", "evaluates_to_first_operand", "operators")  # of a call, besides its arguments
PROJECTED = frozenset({"attention.q", "attention.k", "attention.v", "attention.o", "ffn.up", "ffn.gate", "ffn.down"})
MOST_CHOICES = 64

Axes = tuple[int, ...]
Choice = dict[fx.Node, Axes]
Known = ChainMap[fx.Node, fx.Node]


class MakeParameter(Protocol):
    """Makes the narrow copy of a stored parameter, and reads it."""

    def __call__(self, name: str, axes: Axes, shape: tuple[int, ...]) -> fx.Node: ...


@dataclass
class NarrowCopy:
    """The narrow copies of values of the base graph.

    Attributes:
        m, op: of the edit.
        scaling: how sizes become narrow.
        parameter: makes the copy of a stored parameter.
        starts: the values of the base that the stream begins with; `known` has their narrow ones.
        known: narrow values, by the base's.
    """

    m: Match
    op: Builder
    scaling: Scaling
    parameter: MakeParameter
    starts: Iterable[fx.Node]
    known: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _beside: dict[tuple[fx.Node, tuple[tuple[fx.Node, Axes], ...]], fx.Node] = field(default_factory=dict)
    _decided: dict[str, Axes] = field(default_factory=dict)
    _sources: dict[fx.Node, dict[fx.Node, None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stream = set(self.starts)
        for node in base_nodes(self.m):
            if ops.name(node) != "sym_size" and not self._stream.isdisjoint(self._operands(node).values()):
                self._stream.add(node)

    def value(self, node: fx.Node, instead: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """Return the narrow copy of a value of the base that depends on the start.

        Args:
            node: the value.
            instead: narrow values that the computation reads instead of those of the base's nodes.

        Raises:
            PeftGraphError: a call on the way to it does not scale.
        """
        known: Known = ChainMap({}, dict(instead or {}), self.known)
        todo = [node]
        while todo:
            last = todo[-1]
            operands = [] if last in known else self._operands(last).values()
            waiting = [one for one in operands if one in self._stream and one not in known]
            if not waiting:
                todo.pop()
                if last not in known:
                    known[last] = self._copied(last, known)
            todo += waiting
        result = known[node]
        for one, copy in known.maps[0].items():
            self.known.setdefault(one, copy)
        return result

    # the stream

    def _operands(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        return operands_of(self.m, node)

    def _copied(self, node: fx.Node, known: Known) -> fx.Node:
        """Copy one call of the stream."""
        rows = self._with_earlier_rows(node, known)
        if rows is not None:
            return rows
        operands = self._operands(node)
        narrow = {one: known[base] for one, base in operands.items() if base in self._stream}
        beside = {one: base for one, base in operands.items() if base not in self._stream and self._sources_of(base)}
        self._check_call(node, operands)
        values = {one: copy.meta["val"] for one, copy in narrow.items()}
        choice, arguments = self._chosen(node, values, beside)
        made = dict(narrow)
        for one, base in beside.items():
            made[one] = self._beside_value(one, base, choice)
        return self._emit(node, *arguments, made)

    def _check_call(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node]) -> None:
        """Refuse what has an effect, and what reads values of other passes.

        Raises:
            PeftGraphError: it is one of these.
        """
        if writes_in_place(node):
            raise self._refusal(node, "writes into a value of the base")
        wrong = next((one for one, base in operands.items() if "origin" in base.meta), None)
        if wrong is not None:
            raise self._refusal(node, f"reads %{wrong.meta.get('label', wrong.name)}, which another pass made")

    def _with_earlier_rows(self, node: fx.Node, known: Known) -> fx.Node | None:
        """Copy a call that puts the rows of earlier calls before those of this one, which have a cache of their own;
        None for any other call."""
        if ops.name(node) != "cat":
            return None
        pieces = cast("Sequence[fx.Node]", node.args[0])
        if not any(self.op.is_cached(one) for one in pieces):
            return None
        if len(pieces) != 2 or not self.op.is_cached(pieces[0]):
            raise self._refusal(node, "is no concatenation of earlier rows and new ones")
        self._check_call(node, self._operands(node))
        return self.op.with_earlier_rows(known[self._operands(node)[pieces[1]]], pieces[0])

    def _chosen(
        self, node: fx.Node, values: Mapping[fx.Node, Any], beside: Mapping[fx.Node, fx.Node]
    ) -> tuple[Choice, tuple[Any, Any]]:
        """Return the first choice of narrow axes of the tables beside the stream that a call takes."""
        reasons: list[str] = []
        for choice in self._choices(beside.values()):
            try:
                trial: dict[fx.Node, Any] = {}
                mine = {one: self._trial(base, choice, trial) for one, base in beside.items()}
                arguments, _ = self._run(node, {**values, **mine})
            except Misfit as misfit:
                reasons.append(str(misfit))
                continue
            self._decide(choice)
            return choice, arguments
        raise self._refusal(node, reasons[-1] if reasons else "reads a parameter at two widths")

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[tuple[Any, Any], Any]:
        """Return the arguments of a call on narrow values, and its result under fake tensors.

        Raises:
            Misfit: it does not take them.
        """
        args, kwargs = self.scaling.arguments(node, values)
        fakes = fx.map_arg((args, kwargs), lambda one: self._as_called(values.get(one, one.meta["val"])))
        target: Any = node.target
        try:
            with _failures_unlogged():
                result = self.op.context.inference.value_of_call(target, *fakes)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what torch says of operands
            raise Misfit(f"does not take narrow operands: {str(error).splitlines()[0]}") from None
        self.scaling.check(node, values, result)
        return (args, kwargs), result

    def _as_called(self, value: Any) -> Any:
        """Return an operand's value as the builder casts it, where new parameters are wider than the base."""
        wide = self.op.adapter_dtype
        if wide == self.op.dtype or not isinstance(value, Tensor) or value.dtype != self.op.dtype:
            return value
        return self.op.context.inference.value_of_call(aten.to.dtype, (value, wide), {})

    def _emit(self, node: fx.Node, args: Any, kwargs: Any, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Insert the copy of a call."""
        args, kwargs = fx.map_arg((args, kwargs), lambda one: made.get(one, one))
        target: Any = node.target
        copy = self.op.call(target, *args, **kwargs)
        copy.meta.update({key: node.meta[key] for key in MEANING if key in node.meta})
        return copy

    # what is computed beside it

    def _sources_of(self, node: fx.Node) -> dict[fx.Node, None]:
        """Return the tables that a value beside the stream is computed from."""
        todo = [node]
        while todo:
            last = todo[-1]
            operands = list(dict.fromkeys(self._operands(last).values()))
            waiting = [one for one in operands if one not in self._sources]
            if last in self._sources or not waiting:
                todo.pop()
                own: dict[fx.Node, None] = {last: None} if self._is_table(last) else {}
                self._sources.setdefault(last, own | {one: None for by in operands for one in self._sources[by]})
            todo += waiting
        return self._sources[node]

    def _is_table(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if node.op == "get_attr":
            if not isinstance(value, Tensor) or self._is_parameter(node):
                return self._is_parameter(node)
            return (value.is_floating_point() or value.is_complex()) and value.dim() > 0
        if ops.name(node) not in CREATED or not isinstance(value, Tensor):
            return False
        return any(isinstance(size, int) and size > 1 for size in value.shape)

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and self.m.table[str(node.target)].kind == "parameter"

    def _choices(self, values: Iterable[fx.Node]) -> Iterator[Choice]:
        """Yield the narrow axes of the tables that some values are computed from, the likeliest first."""
        tables = list(dict.fromkeys(one for value in values for one in self._sources_of(value)))
        each = [self._axes(one) for one in tables]
        count = 1
        for one in each:
            count *= len(one)
        if count > MOST_CHOICES:
            levels = range(max(map(len, each)))
            combined: Iterable[tuple[Axes, ...]] = (tuple(one[min(i, len(one) - 1)] for one in each) for i in levels)
        else:
            numbers = sorted(product(*(range(len(one)) for one in each)), key=lambda it: (sum(it), it))
            combined = (tuple(one[i] for one, i in zip(each, which, strict=True)) for which in numbers)
        for axes in combined:
            yield dict(zip(tables, axes, strict=True))

    def _axes(self, table: fx.Node) -> list[Axes]:
        """Return the choices of narrow axes of a table; none at all comes first."""
        name = self._name(table)
        if name in self._decided:
            return [self._decided[name]]
        shape = table.meta["val"].shape
        free = [axis for axis, size in enumerate(shape) if self.scaling.shrinks(size)]
        if len(free) > 3:
            free = [free[0], free[-1]]
        found: list[Axes] = [()]
        for chosen in ({*free[:1], *free[-1:]}, set(free), set(free[-1:]), set(free[:1])):
            found.append(tuple(sorted(chosen)))
        required = self._required.get(name) if self._is_parameter(table) else None
        return [one for one in dict.fromkeys(found) if required is None or not one or required in one]

    @property
    def _required(self) -> Mapping[str, int]:
        """The axis of the output features of every projection, which must be narrow."""
        found: dict[str, int] = {}
        for site in self.m.sites:
            if site.role in PROJECTED and site.weight is not None and site.weight.axes is None:
                first = self.m.table.tied(site.weight.parameter)[0]
                found[first] = 1 if site.weight.transposed else 0
        return found

    def _name(self, table: fx.Node) -> str:
        """Return what a table is known by: the first of the names that are tied, or the node's."""
        return self.m.table.tied(str(table.target))[0] if table.op == "get_attr" else table.name

    def _decide(self, choice: Choice) -> None:
        for table, axes in choice.items():
            if self._is_parameter(table):
                self._decided[self._name(table)] = axes

    def _trial(self, node: fx.Node, choice: Choice, known: dict[fx.Node, Any]) -> Any:
        """Infer what a value beside the stream would be under a choice."""
        for one in self._between(node, known):
            if one in choice:
                known[one] = self._trial_table(one, choice[one])
            else:
                operands = {name: known[base] for name, base in self._operands(one).items() if base in known}
                known[one] = self._run(one, operands)[1]
        return known[node]

    def _trial_table(self, table: fx.Node, axes: Axes) -> Any:
        """Infer what the narrow copy of a table would be."""
        infer, value = self.op.context.inference.value_of_call, table.meta["val"]
        if self._is_parameter(table):
            dtype = self.op.adapter_dtype if value.is_floating_point() else value.dtype
            return infer(aten.new_empty.default, (value, list(self._shape(table, axes))), {"dtype": dtype})
        for axis in axes:
            value = infer(aten.slice.Tensor, (value, axis, 0, END, self.scaling.reduction), {})
        return value

    def _shape(self, table: fx.Node, axes: Axes) -> tuple[int, ...]:
        sizes = enumerate(table.meta["val"].shape)
        return tuple(int(size) // self.scaling.reduction if axis in axes else int(size) for axis, size in sizes)

    def _between(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
        """Return the values that a value beside the stream is computed from, from the tables on, in order."""
        order: dict[fx.Node, None] = {}
        todo = [node]
        while todo:
            last = todo[-1]
            operands = () if self._is_table(last) else self._operands(last).values()
            waiting = [one for one in operands if self._sources_of(one) and one not in order and one not in known]
            if not waiting:
                todo.pop()
                if last not in known:
                    order[last] = None
            todo += waiting
        return list(order)

    def _beside_value(self, read: fx.Node, node: fx.Node, choice: Choice) -> fx.Node:
        """Return what a call reads in place of a value beside the stream; the base's own where nothing differs."""
        key = self._key(node, choice)
        if not any(axes or self._is_parameter(table) for table, axes in key):
            return read
        for one in self._between(node, {}):
            mine = self._key(one, choice)
            if (one, mine) not in self._beside and any(axes or self._is_parameter(table) for table, axes in mine):
                self._beside[one, mine] = self._beside_copy(one, choice)
        return self._beside[node, key]

    def _key(self, node: fx.Node, choice: Choice) -> tuple[tuple[fx.Node, Axes], ...]:
        return tuple((table, choice[table]) for table in self._sources_of(node))

    def _beside_copy(self, node: fx.Node, choice: Choice) -> fx.Node:
        if node in choice:
            return self._table(node, choice[node])
        operands = self._operands(node)
        read = {one: base for one, base in operands.items() if self._sources_of(base)}
        made = {one: self._beside.get((base, self._key(base, choice)), one) for one, base in read.items()}
        values = {one: copy.meta["val"] for one, copy in made.items()}
        return self._emit(node, *self._run(node, values)[0], made)

    def _table(self, node: fx.Node, axes: Axes) -> fx.Node:
        """Return the narrow copy of a table: a new parameter, or every R-th entry."""
        if self._is_parameter(node):
            return self.parameter(self._name(node), axes, self._shape(node, axes))
        for axis in axes:
            node = self.op.call(aten.slice.Tensor, node, axis, 0, END, self.scaling.reduction)
        return node

    def _refusal(self, node: fx.Node, reason: str) -> PeftGraphError:
        label = node.meta.get("label", node.name)
        return PeftGraphError(
            f"{self.op.pass_spec}: %{label} {reason}. A copy of this model with {self.scaling.reduction} times fewer "
            "features cannot be built; choose another reduction, or another method."
        )


@contextmanager
def _failures_unlogged() -> Iterator[None]:
    """Keep torch from logging that operands do not fit: a choice that is tried may not."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
