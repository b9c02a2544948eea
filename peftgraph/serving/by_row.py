"""Computes calls for rows of a batch that each read parameters of an adapter of their own.

A value that depends on an adapter's parameters alone is a `Stack`: the values of all adapters along a first axis. A
call that reads one and a value with rows becomes calls that give each row the result of its own adapter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from peftgraph.errors import Conflict
from peftgraph.ir.builder import BORROWING_OPERATORS
from peftgraph.ir.shape_inference import ShapeInference
from peftgraph.serving.convolution_by_row import convolve_by_row
from peftgraph.serving.neutrality import GROUPED_PRODUCTS
from peftgraph.serving.product_by_row import linear_by_row

aten = torch.ops.aten
CARRIED = ("follows", "evaluates_to_first_operand", "training_only", "evaluation_only")  # how a call runs, in metadata


@dataclass(frozen=True)
class Stack:
    """The values of all adapters.

    Attributes:
        read: returns the node of them, (M, ...); of matrices also (M, ..., I, O), if asked for them transposed.
        sizes: of one value.
    """

    read: Callable[[bool], fx.Node]
    sizes: tuple[int, ...]

    @property
    def dim(self) -> int:
        """The number of axes of one value."""
        return len(self.sizes)

    def node(self, transposed: bool = False) -> fx.Node:
        """Return the node of the values, (M, ...); the last two axes are exchanged if `transposed`."""
        return self.read(transposed)


@dataclass(frozen=True)
class Chosen:
    """Rows of all adapters' values by an index, such as the expert of each token: (N, ...) for each adapter.

    Attributes:
        stack: of values (E, ...).
        index: (N,), the node of each row's entry among the E.
    """

    stack: Stack
    index: fx.Node

    @property
    def dim(self) -> int:
        """The number of axes of one value."""
        return self.stack.dim


@dataclass
class RowWriter:
    """Writes calls by row into a graph.

    Attributes:
        graph: is changed in place.
        inference: of the values of new nodes.
        ids: the node of the stacks' entry of each row, (B,).
        owner: the passes, for messages.
        order: the `meta["order"]` that those of new nodes begin with.
        label: the printed name that those of new nodes begin with.
    """

    graph: fx.Graph
    inference: ShapeInference
    ids: fx.Node
    owner: str
    labels: dict[str, int]
    order: tuple[int, ...] = (0,)
    label: str = ""
    cursor: fx.Node | None = None
    count: int = 0
    _spread: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])
    _selected: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])

    # plain calls

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call an operator on nodes and literals."""
        return self.insert("call_function", target, args, kwargs, _opname(target))

    def insert(self, op: str, target: Any, args: Any, kwargs: Any, hint: str, value: Any = None) -> fx.Node:
        """Insert a node at the end; the graph is sorted once it is whole."""
        with self.graph.inserting_before(self.graph.output_node()):
            node = self.graph.create_node(
                op, target, tuple(args), dict(kwargs), name=f"{self.label}_{hint}".replace(".", "_")
            )
        node.meta["val"] = self.inference.value_of(node) if value is None else value
        base = f"{self.label}.{hint}"
        number = self.labels[base] = self.labels.get(base, 0) + 1
        node.meta["label"] = base if number == 1 else f"{base}#{number}"
        self.count += 1
        node.meta["order"] = (*self.order, self.count)
        return node

    # rows

    @property
    def batch(self) -> Any:
        """The size of the batch."""
        return self.ids.meta["val"].shape[0]

    def axis_of(self, value: Tensor) -> int | None:
        """Return the axis of a value that has rows: the batch, alone or with others behind it; None where all rows
        share the value."""
        symbol = self.batch.node.expr
        sizes = [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in value.shape]
        exact = next((i for i, size in enumerate(sizes) if size == symbol), None)
        if exact is not None:
            return exact
        return next((i for i, size in enumerate(sizes) if symbol in size.free_symbols), None)

    def entries(self, value: fx.Node, axis: int) -> fx.Node:
        """Return the stacks' entry for each position along the axis of rows of a value."""
        key = str(value.meta["val"].shape[axis])
        if key in (str(self.batch), "1"):
            return self.ids
        selection = _selection(value) if axis == 0 else None
        if selection is not None:
            source, index = selection
            if value.name not in self._selected:
                rows = self.entries(source, 0)
                self._selected[value.name] = self.call(aten.index_select.default, rows, 0, index)
            return self._selected[value.name]
        if key not in self._spread:
            total, batch = self.call(aten.sym_size.int, value, axis), self.call(aten.sym_size.int, self.ids, 0)
            each = self.call(operator.floordiv, total, batch)
            beside = self.call(aten.expand.default, self.call(aten.unsqueeze.default, self.ids, 1), [batch, each])
            self._spread[key] = self.call(aten.reshape.default, beside, [total])
        return self._spread[key]

    def own(self, stack: Stack | Chosen, like: fx.Node, dim: int | None = None) -> fx.Node:
        """Return each row's own value of a stack, in a shape that broadcasts over a value with `dim` axes, by default
        those of `like`, whose axis of rows it gets.

        Raises:
            Conflict: that value has no rows, or the parameter has a size of its own where they are.
        """
        value = like.meta["val"]
        axes: int = value.dim() if dim is None else dim
        found = self.axis_of(value)
        axis = found or 0
        place = 0 if found is None else axis + axes - value.dim()
        if found is None and (not value.dim() or value.shape[0] != 1):
            raise Conflict(f"{self.owner} changes a value of no rows (%{like.meta.get('label', like.name)}).")
        gathered = self._gathered(stack, self.entries(like, axis))
        if isinstance(stack, Chosen) and axes == stack.dim and place == 0:
            return gathered
        sizes = [*[1] * (axes - stack.dim), *gathered.meta["val"].shape[1:]]
        if len(sizes) != axes or sizes[place] != 1:
            raise Conflict(
                f"{self.owner} has a parameter along the rows of a batch (%{like.meta.get('label', like.name)}), "
                "which cannot differ by row."
            )
        del sizes[place]
        spread = self.call(aten.reshape.default, gathered, [-1, *(int(size) for size in sizes)])
        return spread if place == 0 else self.call(aten.movedim.int, spread, 0, place)

    def _gathered(self, stack: Stack | Chosen, rows: fx.Node) -> fx.Node:
        """Return the value of each row's adapter."""
        if isinstance(stack, Stack):
            return self.call(aten.index_select.default, stack.node(), 0, rows)
        flat, index = self.among(stack.stack, rows, stack.index, False)
        return self.call(aten.index_select.default, flat, 0, index)

    def among(self, stack: Stack, rows: fx.Node, index: fx.Node, transposed: bool) -> tuple[fx.Node, fx.Node]:
        """Return the values of all adapters and entries along one axis, and where each row's is."""
        whole = stack.node(transposed)
        first = self.call(aten.mul.Tensor, rows, int(whole.meta["val"].shape[1]))
        return self.call(aten.flatten.using_ints, whole, 0, 1), self.call(aten.add.Tensor, first, index)

    def choose(self, own: fx.Node, other: fx.Node, member: fx.Node) -> fx.Node:
        """Return `own` on rows where `member` (B,) holds and `other` elsewhere.

        Raises:
            Conflict: no axis of the value has rows.
        """
        value = own.meta["val"]
        axis = self.axis_of(value)
        if axis is None:
            raise Conflict(f"{self.owner} changes %{own.meta['label']}, which all rows of a batch share.")
        rows = self.entries(own, axis)
        inside = member if rows is self.ids else self.call(aten.gt.Scalar, rows, 0)
        mask = self.call(aten.reshape.default, inside, [-1 if i == axis else 1 for i in range(value.dim())])
        return self.call(aten.where.self, mask, own, other)

    # calls that read stacks

    def by_row(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | Stack | Chosen:
        """Write a call of the adapter's graph, some of whose operands are stacks.

        Raises:
            Conflict: it is not known how rows with other operands are computed together.
        """
        target: Any = node.target
        if target in BORROWING_OPERATORS and isinstance(args[0], Stack):
            return self._cast(target, args)
        if target in CASTS and isinstance(args[1], Stack):  # to the dtype of a parameter
            return self.call(target, args[0], args[1].node())
        rule = _grouped if str(target).startswith(GROUPED_PRODUCTS) else RULES.get(target)
        result = None if rule is None else rule(self, node, args, kwargs)
        if result is None:
            raise Conflict(
                f"{self.owner} computes {_opname(target)} of a parameter at %{node.meta.get('label', node.name)}; rows "
                "of other adapters cannot be computed beside it."
            )
        return result

    def _cast(self, target: Any, args: tuple[Any, ...]) -> Stack:
        stack: Stack = args[0]
        return Stack(lambda transposed: self.call(target, stack.node(transposed), *args[1:]), stack.sizes)

    def stack_call(self, stack: Stack, target: Any, *args: Any) -> Stack:
        """Return a stack with an elementwise operator applied to every value."""
        return Stack(lambda transposed: self.call(target, stack.node(transposed), *args), stack.sizes)


Rule = Callable[[RowWriter, fx.Node, tuple[Any, ...], dict[str, Any]], "fx.Node | Stack | Chosen | None"]
Result = fx.Node | Stack | Chosen | None


def _elementwise(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    if not any(isinstance(one, fx.Node) for one in _flat(args, kwargs)):
        return _of_numbers(op, node, args)
    plain = [one for one in _flat(args, kwargs) if isinstance(one, fx.Node)]
    like = max(plain, key=lambda one: (op.axis_of(one.meta["val"]) is not None, one.meta["val"].dim()))
    dim = node.meta["val"].dim()

    def given(one: Any) -> Any:
        return op.own(one, like, dim) if isinstance(one, Stack | Chosen) else one

    target: Any = FUNCTIONAL.get(node.target, node.target)
    return op.call(target, *map(given, args), **{name: given(one) for name, one in kwargs.items()})


def _of_numbers(op: RowWriter, node: fx.Node, args: tuple[Any, ...]) -> Result:
    """Compute a parameter and a number, before rows take their own."""
    one, *numbers = args
    if isinstance(one, Chosen):
        return Chosen(op.stack_call(one.stack, node.target, *numbers), one.index)
    return op.stack_call(one, node.target, *numbers) if isinstance(one, Stack) else None


def _index_select(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    stack, axis, index = args
    return Chosen(stack, index) if isinstance(stack, Stack) and axis == 0 and isinstance(index, fx.Node) else None


def _grouped(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    """Multiply each row by the matrix that its adapter has for its expert."""
    x, weight, offsets = args[:3]
    if not isinstance(x, fx.Node) or not isinstance(weight, Stack) or weight.dim != 3 or kwargs or len(args) > 3:
        return None
    total = op.call(aten.sym_size.int, x, 0)
    numbers = op.call(aten.arange.default, total, dtype=torch.int32, device=x.meta["val"].device)
    expert = op.call(aten.searchsorted.Tensor, offsets, numbers, right=True)
    inner, out = weight.sizes[-2:]
    wide = out > inner
    flat, index = op.among(weight, op.entries(x, 0), expert, not wide)
    return op.call(linear_by_row, x, flat, index, 0, wide)


def _linear(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    x, weight, bias = (*args, None)[:3]
    if not isinstance(x, fx.Node):
        return None
    y = _product(op, x, weight, False) if isinstance(weight, Stack) else op.call(aten.linear.default, x, weight)
    return y if bias is None else _plus(op, y, bias)


def _product(op: RowWriter, x: fx.Node, weight: Stack, given_transposed: bool) -> fx.Node | None:
    """Return x W^T for matrices W by row, which the stack holds as (O, I), or as (I, O)."""
    axis = op.axis_of(x.meta["val"])
    if weight.dim != 2 or axis == x.meta["val"].dim() - 1 or (axis is None and x.meta["val"].shape[0] != 1):
        return None
    first, second = weight.sizes
    out, inner = (second, first) if given_transposed else (first, second)
    wide = out > inner  # such matrices are stored as the product of all of them reads them
    place = axis or 0
    return op.call(linear_by_row, x, weight.node(wide != given_transposed), op.entries(x, place), place, wide)


def _plus(op: RowWriter, y: fx.Node | None, bias: Any) -> fx.Node | None:
    if y is None:
        return None
    return op.call(aten.add.Tensor, y, op.own(bias, y) if isinstance(bias, Stack) else bias)


def _matmul(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    x, weight = args
    return _product(op, x, weight, True) if isinstance(x, fx.Node) and isinstance(weight, Stack) else None


def _addmm(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    bias, x, weight = args
    if kwargs or not isinstance(x, fx.Node):
        return None
    y = _product(op, x, weight, True) if isinstance(weight, Stack) else op.call(aten.mm.default, x, weight)
    return _plus(op, y, bias)


def _embedding(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    table, numbers = args[:2]
    if not isinstance(table, Stack) or not isinstance(numbers, fx.Node):
        return None
    value, whole = numbers.meta["val"], table.node()
    axis = op.axis_of(value)
    if axis is None and (not value.dim() or value.shape[0] != 1):
        return None
    shape = [-1 if i == (axis or 0) else 1 for i in range(value.dim())]
    first = op.call(aten.mul.Tensor, op.entries(numbers, axis or 0), int(whole.meta["val"].shape[1]))
    places = op.call(aten.add.Tensor, op.call(aten.reshape.default, first, shape), numbers)
    return op.call(aten.embedding.default, op.call(aten.flatten.using_ints, whole, 0, 1), places)


def _norm(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    """Scale and shift a norm over the last axes by row."""
    x, shape, *rest = args
    layer = node.target is aten.layer_norm.default
    weight, bias, *others = (*rest, None, None)[: max(2, len(rest))] if layer else (*rest[:1], None, *rest[1:])
    if not isinstance(x, fx.Node):
        return None
    y: fx.Node | None = op.call(node.target, x, shape, *([None, None] if layer else [None]), *others, **kwargs)  # pyright: ignore[reportArgumentType]
    if weight is not None and y is not None:
        y = op.call(aten.mul.Tensor, y, op.own(weight, y) if isinstance(weight, Stack) else weight)
    return y if bias is None else _plus(op, y, bias)


def _expand(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    stack, sizes = args
    place = next((i for i, one in enumerate(sizes) if isinstance(one, fx.Node) and _is(one, op.batch)), None)
    if not isinstance(stack, Stack) or place is None:
        return None
    gathered = op.call(aten.index_select.default, stack.node(), 0, op.ids)
    own = [*[1] * (len(sizes) - stack.dim), *gathered.meta["val"].shape[1:]]
    if own[place] != 1:
        return None
    del own[place]
    spread = op.call(aten.reshape.default, gathered, [-1, *(int(size) for size in own)])
    if place:
        spread = op.call(aten.movedim.int, spread, 0, place)
    return op.call(aten.expand.default, spread, sizes)


def _cat(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    parts, axis = args[0], args[1] if len(args) > 1 else 0
    like = next((one for one in parts if isinstance(one, fx.Node)), None)
    dim = node.meta["val"].dim()
    if like is None or op.axis_of(like.meta["val"]) == axis % dim:
        return None
    return op.call(aten.cat.default, [op.own(one, like) if isinstance(one, Stack) else one for one in parts], axis)


def _einsum(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    """Give the parameters the letter of the rows."""
    equation, parts = args[:2]
    letters, result = _letters(equation, [_dim(one) for one in parts])
    like = next((i for i, one in enumerate(parts) if isinstance(one, fx.Node)), None)
    if like is None:
        return None
    axis = op.axis_of(parts[like].meta["val"])
    if axis is None or letters[like][axis] not in result:
        return None
    row, found = letters[like][axis], list[fx.Node]()
    for i, one in enumerate(parts):
        if isinstance(one, Stack):
            if row in letters[i]:
                return None
            letters[i] = row + letters[i]
            found.append(op.call(aten.index_select.default, one.node(), 0, op.entries(parts[like], axis)))
        else:
            found.append(one)
    return op.call(aten.einsum.default, f"{','.join(letters)}->{result}", found)


def _letters(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """Return the letters of an einsum's operands and of its result, with letters in the place of "..."."""
    terms, _, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    free = [one for one in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if one not in equation]
    longest = (
        max(dim - len(one.replace("...", "")) for one, dim in zip(letters, dims, strict=True) if "..." in one)
        if "..." in equation
        else 0
    )
    names = "".join(free[:longest])

    def spelled(term: str, dim: int) -> str:
        count = dim - len(term.replace("...", ""))
        return term.replace("...", names[longest - count :])

    return [spelled(one, dim) for one, dim in zip(letters, dims, strict=True)], result.replace("...", names)


def _dim(value: Any) -> int:
    return value.dim if isinstance(value, Stack) else value.meta["val"].dim()


def _convolution(op: RowWriter, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    x, kernel, bias, *rest = (*args, None)[: max(3, len(args))]
    if not isinstance(x, fx.Node) or kwargs or op.axis_of(x.meta["val"]) != 0:
        return None
    if isinstance(kernel, Stack):
        y = op.call(convolve_by_row, node.target, x, kernel.node(), op.entries(x, 0), *rest)
    else:
        y = op.call(node.target, x, kernel, None, *rest)  # pyright: ignore[reportArgumentType]
    if bias is None:
        return y
    if isinstance(bias, Stack):
        ones = [1] * (x.meta["val"].dim() - 2)
        spread = Stack(
            lambda _: op.call(aten.reshape.default, bias.node(), [-1, *bias.sizes, *ones]), (*bias.sizes, *ones)
        )
        return op.call(aten.add.Tensor, y, op.own(spread, y))
    shape = [-1, *[1] * (x.meta["val"].dim() - 2)]
    return op.call(aten.add.Tensor, y, op.call(aten.reshape.default, bias, shape))


CASTS = {aten.to.other, aten.type_as.default}
FUNCTIONAL: dict[Any, Any] = {aten.add_.Tensor: aten.add.Tensor, aten.mul_.Tensor: aten.mul.Tensor}
ELEMENTWISE = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.pow.Tensor_Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.where.self,
    aten.lerp.Tensor,
    aten.addcmul.default,
    aten.add_.Tensor,
    aten.mul_.Tensor,
)
RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.expand.default: _expand,
    aten.cat.default: _cat,
    aten.einsum.default: _einsum,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
}


def _selection(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return what rows of a value were selected from along the first axis, and the index; None where they stand as in
    the batch."""
    size = str(value.meta["val"].shape[0])
    node: fx.Node | None = value
    while node is not None and node.op == "call_function":
        source = node.args[0] if node.args else None
        if node.target is aten.index.Tensor and isinstance(source, fx.Node) and isinstance(node.args[1], list | tuple):
            index, *others = node.args[1]
            if isinstance(index, fx.Node) and not any(others):
                return source, index
        if node.target is aten.index_select.default and node.args[1] == 0:
            return source, node.args[2]  # pyright: ignore[reportReturnType]
        if node.target is operator.getitem and isinstance(source, fx.Node):
            node = source
            continue
        node = next((one for one in node.all_input_nodes if _first_size(one) == size), None)
    return None


def _first_size(node: fx.Node) -> str:
    value = node.meta["val"]
    return str(value.shape[0]) if isinstance(value, Tensor) and value.dim() else ""


def _is(size: fx.Node, other: Any) -> bool:
    return str(size.meta["val"]) == str(other)


def _flat(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    return [*args, *kwargs.values()]


def mapped(node: fx.Node, given: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with something else in the place of each operand."""

    def one(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return given(value)
        if isinstance(value, list | tuple):
            return type(value)(one(item) for item in value) if type(value) is list else [one(item) for item in value]
        return value

    return tuple(one(value) for value in node.args), {name: one(value) for name, value in node.kwargs.items()}


def _opname(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].strip("_")
    return getattr(target, "__name__", str(target))
