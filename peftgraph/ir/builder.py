"""Makes, redirects and erases nodes of a program's graph; no other code in the library does so.

The builder sets the value metadata and the origin of every node that it makes, and records its changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftgraph.errors import Conflict, PeftGraphError, RecipeError
from peftgraph.ir.added_inputs import add_placeholder
from peftgraph.ir.dead_code import WRITE_DISABLED
from peftgraph.ir.dtype_literals import LITERAL_FORMS
from peftgraph.ir.edits import AddedInput, CachedRows, SizeIncrease
from peftgraph.ir.graphs import find_node
from peftgraph.ir.modes import SEQUENCE_AXIS, by_mode
from peftgraph.ir.quantised import COMPUTES_IN, ROUNDS, QuantisedWeight
from peftgraph.ir.shape_inference import ShapeInference, fake_like
from peftgraph.ir.signature import Signature
from peftgraph.ir.tensor_names import TensorNames
from peftgraph.ir.tensor_table import TensorEntry

aten = torch.ops.aten

Initializer = Callable[[Tensor], Any]
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "gelu_tanh": partial(aten.gelu.default, approximate="tanh"),
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
    "sigmoid": aten.sigmoid.default,
}

# What takes the dtype, device or shape of an operand, and nothing else of it.
BORROWING_OPERATORS = {aten.to.other, aten.type_as.default, aten.view_as.default, aten.expand_as.default}


# Whether new parameters get their initial values; not where all of them are overwritten at once, as in loading.
starts_computed: ContextVar[bool] = ContextVar("starts_computed", default=True)

# Whether the factors of `Builder.mul` are frozen tensors of the adapter, so that adapters with other factors, such as
# alpha / rank, have the same graph.
scales_as_tensors: ContextVar[bool] = ContextVar("scales_as_tensors", default=False)


@dataclass
class ApplicationContext:
    """State that all edits of one application of a pass share.

    Attributes:
        owner: the dotted prefix of shared parameters: the pass's word and, if it has one, its name.
        inference: of the new nodes' values, so that equal sites infer them once.
        entries: the shared parameters.
        nodes: the shared values, by the key they were built under.
        labels: how many values have been printed under each name so far.
        cache_inputs: the names of the model's inputs that hold keys and values of earlier calls.
        signature: of the program; None where only the model's own code calls the graph.
        inputs: the inputs beside the model's own, by name, and the spec of the pass that asked for each first.
    """

    owner: str
    inference: ShapeInference
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    cache_inputs: frozenset[str] = frozenset()
    signature: Signature | None = None
    inputs: dict[str, tuple[AddedInput, str]] = field(default_factory=dict[str, tuple[AddedInput, str]])


@dataclass
class Builder:
    """Builds one edit in `graph`, inserting after `cursor`.

    It is the argument `op` of a pass's `delta`. Methods return fx nodes, whose shape and dtype are inferred
    immediately.

    Attributes:
        graph: a copy of a program's graph, owned by the caller.
        site, word: of the site and the pass; together the prefix of the printed names of new nodes, such as
            `0.attention.q.lora`.
        owner: the dotted prefix of new parameters, such as `layers.0.self_attn.q_proj`.
        dtype: of the base.
        adapter_dtype: of new parameters; if it is wider than the base's, products are computed in it.
        device: of new parameters.
        tensor_names: the names already in use, and what made them.
        pass_spec: the spec of the pass that builds.
        order: the `meta["order"]` that those of new nodes begin with.
        cursor: the node after which new ones are inserted.
        context: the state that all edits of the pass share.
        pinned_users: nodes that keep reading their old operands, whatever the edit replaces.
        size_increases: literal sizes in existing calls that the edit increased.
        disabled_writes: existing in-place writes that the edit disabled.
        quantised: the stored tensors that the edit put codes in the place of.
        narrowed: the calls of others that the edit lets compute in another dtype.
        rewritten: the codes of an earlier edit that it gave other values.
        cached: what the edit keeps in the cache.
        inputs: the inputs beside the model's own that the edit reads.
        shared_parameters: those of another use of the same weight, by full name, which this use shares.
    """

    graph: fx.Graph
    site: str
    word: str
    owner: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    tensor_names: TensorNames
    pass_spec: str
    order: tuple[int, ...]
    cursor: fx.Node
    context: ApplicationContext
    nodes: list[fx.Node] = field(default_factory=list)
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    pinned_users: set[fx.Node] = field(default_factory=set)
    size_increases: list[SizeIncrease] = field(default_factory=list)
    disabled_writes: list[str] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)
    narrowed: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    cached: list[CachedRows] = field(default_factory=list)
    inputs: list[AddedInput] = field(default_factory=list[AddedInput])
    shared_parameters: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the prefix of the printed names of new nodes."""
        return f"{self.site}.{self.word}"

    # parameters

    def param(self, name: str, shape: Sequence[int], init: Initializer, trainable: bool = True) -> fx.Node:
        """Make the parameter `owner.name` and read it; `init` fills it in place. A frozen one is saved with the adapter
        too.

        Raises:
            Conflict: the name is taken.
        """
        full = f"{self.owner}.{name}"
        known = self.shared_parameters.get(full)
        self.entries[full] = self._new(full, shape, init, trainable) if known is None else known
        return self._read(full, name)

    def shared_param(
        self, name: str, shape: Sequence[int], init: Initializer, trainable: bool = True, seed: int | None = None
    ) -> fx.Node:
        """Make a parameter at the first site of the pass, and read the same one at every further site.

        Args:
            name: of the parameter, after the word of the pass.
            shape: the same at every site.
            init: fills it in place.
            trainable: False for a frozen one, which is saved with the adapter too.
            seed: of a frozen one that is not saved: `init` draws it, on the CPU and in float32, from a generator of
                its own with this seed and the name, wherever it is made again, as when the adapter is loaded.

        Raises:
            Conflict: the name is taken by another pass or by the model.
            RecipeError: one that trains has a seed, or sites ask for different shapes.
        """
        full = f"{self.context.owner}.{name}"
        if full not in self.context.entries:
            if seed is not None and trainable:
                raise RecipeError(f"{self.pass_spec}: {name} trains, so it cannot be drawn again from a seed.")
            entry = self._new(full, shape, init, trainable) if seed is None else self._drawn(full, shape, init, seed)
            self.context.entries[full] = entry
        entry = self.entries[full] = self.context.entries[full]
        if tuple(entry.tensor.shape) != tuple(shape):
            sizes = f"{tuple(entry.tensor.shape)} and, at {self.site}, {tuple(shape)}"
            raise RecipeError(f"{self.pass_spec}: its sites share {name}, and it would be {sizes}.")
        return self._read(full, name)

    def _drawn(self, full: str, shape: Sequence[int], init: Initializer, seed: int) -> TensorEntry:
        """Make a frozen parameter whose values follow from a seed and its name alone."""
        own = int.from_bytes(hashlib.sha256(f"{seed} {full.rpartition('.')[2]}".encode()).digest()[:7], "big")

        def draw() -> Tensor:
            value = torch.empty(tuple(shape), dtype=torch.float32)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(own)
                init(value)
            return value

        entry = self._new(full, shape, lambda _: None, False)
        if self.device.type != "meta":
            entry.tensor.data.copy_(draw())
        return replace(entry, draw=draw)

    def shared_value(self, key: str, build: Callable[[], fx.Node]) -> fx.Node:
        """Build a value at the first site of the pass, and return the same node at every further site. A pass that uses
        one does not fold."""
        if key not in self.context.nodes:
            self.context.nodes[key] = build()
        return self.context.nodes[key]

    def mark_derived(self, name: str, value: fx.Node) -> fx.Node:
        """Mark a value that depends on parameters alone: `Program.finalize` replaces it by the parameter
        `owner.name`."""
        value.meta["derived"] = f"{self.owner}.{name}"
        return value

    @staticmethod
    def symbol(value: fx.Node, name: str) -> fx.Node:
        """Name a value that depends on parameters alone, for drawings: "z" instead of its whole formula."""
        value.meta["symbol"] = name
        return value

    def _check_name(self, full: str) -> None:
        """Refuse the name of a new parameter that is in use.

        Raises:
            Conflict: it is.
        """
        if full in self.tensor_names:
            raise Conflict(
                f"{self.pass_spec} would make the parameter {full} at {self.site}, which exists already (made by "
                f'{self.tensor_names.made_by(full)}). Two adapters at one site need names of their own: name="...".'
            )
        inner = self.tensor_names.conflicting(full)
        if inner is not None:
            raise Conflict(
                f"{self.pass_spec} would make the parameter {full} at {self.site}, and {inner} is a parameter already: "
                'one name would be that of a module and of a tensor. Give the pass another name: name="...".'
            )

    def _new(self, full: str, shape: Sequence[int], init: Initializer, trainable: bool = True) -> TensorEntry:
        self._check_name(full)
        value = torch.empty(tuple(shape), dtype=self.adapter_dtype, device=self.device)
        if self.device.type != "meta" and starts_computed.get():
            with torch.no_grad():
                init(value)
        self.tensor_names.add(full, self.pass_spec)
        return TensorEntry(nn.Parameter(value, requires_grad=trainable), "parameter", trainable=trainable, added=True)

    def _read(self, full: str, hint: str) -> fx.Node:
        return self._insert(
            "get_attr", full, (), {}, hint, fake_like(self.context.inference.mode, self.entries[full].tensor)
        )

    def stored_tensor(self, full: str, tensor: Tensor) -> fx.Node:
        """Read a tensor that the program already stores, by its full name."""
        hint = full.rpartition(".")[2]
        return self._insert("get_attr", full, (), {}, hint, fake_like(self.context.inference.mode, tensor))

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """Read a new non-persistent buffer `owner.name`, such as an index table; sites that use the same name share
        one."""
        full = f"{self.owner}.{name}"
        if full not in self.tensor_names:
            self.tensor_names.add(full, self.pass_spec)
            self.entries[full] = TensorEntry(value.to(self.device), "buffer", persistent=False, added=True)
        return self._insert(
            "get_attr", full, (), {}, name, fake_like(self.context.inference.mode, value.to(self.device))
        )

    # quantised weights

    def stored_codes(self, full: str, value: Tensor, shared: bool = False) -> fx.Node:
        """Read a new persistent buffer that is never cast, such as the codes of a weight.

        Args:
            full: its name.
            value: what it holds.
            shared: whether all edits of the pass read the same one.

        Raises:
            Conflict: the name is taken.
        """
        if full in self.context.entries:
            self.entries[full] = self.context.entries[full]
            return self._read(full, full.rpartition(".")[2])
        if full in self.tensor_names:
            raise Conflict(
                f"{self.pass_spec} would store {full} at {self.site}, which exists already (made by "
                f"{self.tensor_names.made_by(full)})."
            )
        self.tensor_names.add(full, self.pass_spec)
        self.entries[full] = TensorEntry(value.to(self.device), "buffer", added=True, keeps_dtype=True)
        if shared:
            self.context.entries[full] = self.entries[full]
        return self._read(full, full.rpartition(".")[2])

    def dequantise(
        self, entries: Mapping[str, TensorEntry], how: QuantisedWeight, tensors: Mapping[str, fx.Node]
    ) -> fx.Node:
        """Compute a weight from its codes, which from now on are what is stored in its place.

        Args:
            entries: of the weight, by each of its names.
            how: it is computed.
            tensors: the nodes that read what it is computed from, by name.
        """
        arguments = [tensors[one] if isinstance(one, str) else one for one in how.arguments]
        value = self._insert("call_function", how.dequantise, tuple(arguments), {}, "dequantise", None)
        place = next(i for i, one in enumerate(arguments) if isinstance(one, torch.dtype))
        value.meta |= {"follows": ((("args", place), "dtype"),), ROUNDS: True}
        first = next(iter(entries.values())).tensor
        stand_in = nn.Parameter(torch.empty(first.shape, dtype=first.dtype, device="meta"), requires_grad=False)
        for name, entry in entries.items():
            self.entries[name] = replace(entry, tensor=stand_in, base_tensor=entry.tensor, quantised=how)
            self.quantised.append(name)
        return self.call(aten.transpose.int, value, -2, -1) if how.transposed else value

    def rewrite_codes(self, entries: Mapping[str, TensorEntry], known: Mapping[str, TensorEntry]) -> None:
        """Give codes that an earlier edit stored other values.

        Args:
            entries: with the new values, by name.
            known: what is stored now.
        """
        for name, entry in entries.items():
            self.entries[name] = replace(entry, base_tensor=known[name].tensor)
            self.rewritten.append(name)

    def compute_in(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Let a call of the model that reads a dequantised weight multiply in `dtype`."""
        if node.meta.get(COMPUTES_IN) is None:
            node.meta[COMPUTES_IN] = dtype
            self.narrowed.append(node.name)

    # computation

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call an aten overload and infer the result under fake tensors.

        Where parameters are wider than the base, floating operands of several widths are cast to the widest first.
        """
        if self.adapter_dtype != self.dtype and target not in BORROWING_OPERATORS:
            args, kwargs = self._promoted(args, kwargs)
        return self._insert("call_function", target, args, kwargs, _opname(target), None)

    def _promoted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        operands: list[fx.Node] = []
        fx.map_arg((args, kwargs), operands.append)
        floating = [one for one in operands if _floats(one)]
        widest = max(floating, key=lambda one: torch.finfo(one.meta["val"].dtype).bits, default=None)
        if widest is None:
            return args, kwargs

        def cast(operand: fx.Node) -> fx.Node:
            return self.in_dtype_of(operand, widest) if _floats(operand) else operand

        return fx.map_arg((args, kwargs), cast)

    def in_dtype_of(self, x: fx.Node, other: fx.Node) -> fx.Node:
        """Cast x to the dtype of another value, also after the module has been moved to another dtype."""
        if x.meta["val"].dtype == other.meta["val"].dtype:
            return x
        return self._insert("call_function", aten.to.other, (x, other), {}, "to", None)

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """Compute x W^T + b: x (..., I), weight (O, I), bias (O) -> (..., O)."""
        return self.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))

    def dropout(self, x: fx.Node, p: float) -> fx.Node:
        """Apply dropout in training mode; p = 0 adds no node."""
        return x if p == 0 else self.call(aten.dropout.default, x, p, True)

    def activation(self, name: str, x: fx.Node) -> fx.Node:
        """Apply an elementwise nonlinearity by its name in `ACTIVATIONS`."""
        function = ACTIVATIONS[name]
        if isinstance(function, partial):
            return self.call(function.func, x, **function.keywords)
        return self.call(function, x)

    def layer_norm(self, x: fx.Node, weight: fx.Node, bias: fx.Node, eps: float = 1e-5) -> fx.Node:
        """Normalise x (..., D) to zero mean and unit variance over its last axis, then compute weight * x + bias."""
        return self.call(aten.layer_norm.default, x, [int(weight.meta["val"].shape[0])], weight, bias, eps)

    def cast(self, x: fx.Node, form: str) -> fx.Node:
        """Cast x to a dtype that follows the parameters': "dtype" is theirs, "wide" is at least float32."""
        cast = self.call(aten.to.dtype, x, LITERAL_FORMS[form](self.dtype))
        cast.meta["follows"] = ((("args", 1), form),)
        return cast

    def scale_in_training(self, x: fx.Node, gate: fx.Node) -> fx.Node:
        """Compute x * gate in training mode and return x in evaluation mode."""
        product = self.call(aten.mul.Tensor, x, gate)
        product.meta["evaluates_to_first_operand"] = True
        return product

    def by_mode(self, evaluation: fx.Node, training: fx.Node) -> fx.Node:
        """Choose a value by the mode of the module: what computes the other one does not run."""
        return self.call(by_mode, evaluation, training)

    def uniform_noise(self, like: fx.Node) -> fx.Node:
        """Draw uniform numbers in [0, 1) of the shape, dtype and device of a value, anew at each call."""
        return self.call(aten.rand_like.default, like)

    def recompute(self, start: fx.Node, stop: fx.Node, x: fx.Node) -> fx.Node:
        """Copy the computation from `start` to `stop`, reading `x` in place of `start`.

        Stored tensors are read where they are; every other operand of the computation must depend on `start`.
        """
        copies = {start: x}
        for node in self.nodes_between(start, stop):
            copies[node] = self.copy_call(node, copies)
        return copies[stop]

    def copy_call(self, node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Copy the call of `node`, with some operands replaced."""
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda operand: instead.get(operand, operand))
        assert not isinstance(node.target, str), f"{node.name} is no call"
        return self.call(node.target, *arguments, **keywords)

    @staticmethod
    def nodes_between(start: fx.Node, stop: fx.Node) -> list[fx.Node]:
        """Return the nodes on paths from `start` to `stop` in topological order, `stop` included."""
        after, todo = set[fx.Node](), [start]
        while todo:
            node = todo.pop()
            if node is not stop:
                todo += [user for user in node.users if user not in after]
                after.update(node.users)
        order: dict[fx.Node, None] = {}
        todo = [stop]
        while todo:
            node = todo[-1]
            waiting = [one for one in node.all_input_nodes if one in after and one not in order]
            todo += waiting
            if not waiting:
                order[todo.pop()] = None
        return list(order)

    @staticmethod
    def nodes_from_inputs(value: fx.Node) -> set[fx.Node]:
        """Return the model inputs that a value depends on, and all nodes on paths from them to it."""
        order, todo = dict[fx.Node, None](), [value]
        while todo:
            new = [one for one in todo.pop().all_input_nodes if one not in order]
            order |= dict.fromkeys(new)
            todo += new
        found = {node for node in order if node.op == "placeholder"}
        return found | {node for start in found for node in Builder.nodes_between(start, value)} - {value}

    def mul(self, x: fx.Node, y: fx.Node | float) -> fx.Node:
        """Compute x * y; a factor of exactly 1 adds no node."""
        if isinstance(y, fx.Node):
            return self.call(aten.mul.Tensor, x, y)
        if scales_as_tensors.get():
            return self.call(aten.mul.Tensor, x, self._scale(y))
        return x if y == 1 else self.call(aten.mul.Tensor, x, y)

    def _scale(self, factor: float) -> fx.Node:
        """Read a factor from a frozen tensor of no axes."""
        name, count = "scale", 1
        while f"{self.owner}.{name}" in self.entries:
            count += 1
            name = f"scale{count}"
        return self.param(name, (), lambda value: value.fill_(factor), trainable=False)

    def add(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """Compute x + y."""
        return self.call(aten.add.Tensor, x, y)

    # inputs

    def input(self, name: str, shape: Sequence[int | str], dtype: torch.dtype, default: float | None = None) -> fx.Node:
        """Read an input that is added to the model: calls give it by name, beside the model's own arguments.

        All sites of a pass, and all passes, that ask for the same input read the same node. It goes with the last edit
        that reads it. Generation repeats an input whose first size is the batch for beams, and keeps it over steps.

        Args:
            name: the keyword of calls, such as "task_ids"; also the column of a data set that a Trainer keeps.
            shape: numbers, or names of sizes of the model's own inputs: "B" is the batch, "S" most often the length.
            dtype: of its values. `op.cast(value, "dtype")` is a floating one in the dtype of the parameters.
            default: the value of all entries where a call omits it; None: every call must give it.

        Raises:
            Conflict: the model has an argument of that name, another pass asks for another input of that name, or the
                traced part is called by the model's own code alone, which gives no such input.
            RecipeError: the name is none that a call can give, or the model has no such size.
        """
        added = AddedInput(name, tuple(shape), dtype, default)
        known, asked = self.context.inputs.get(name, (None, ""))
        if known is None:
            self._add_input(added)
        elif known != added:
            raise Conflict(
                f"{self.pass_spec} asks for the input {added} at {self.site}, and {asked} for {known}. Give one of "
                "them another name."
            )
        if added not in self.inputs:
            self.inputs.append(added)
        return find_node(self.graph, name)

    def _add_input(self, added: AddedInput) -> None:
        """Add the placeholder of an input, in place."""
        what = f"{self.pass_spec} at {self.site}"
        if self.context.signature is None:
            raise Conflict(
                f"{what} asks for the input {added.name!r}, and the traced part of the model is called by the rest of "
                "it, which gives no such input. Trace the whole model."
            )
        try:
            add_placeholder(self.graph, self.context.signature, added)
        except PeftGraphError as error:
            raise type(error)(f"{what}: {error}") from None
        self.context.inputs[added.name] = (added, self.pass_spec)

    # the cache of keys and values

    def is_cached(self, node: fx.Node) -> bool:
        """Tell whether a value is an input of the model that holds keys or values of earlier calls."""
        return node.name in self.context.cache_inputs

    def with_earlier_rows(self, value: fx.Node, like: fx.Node) -> fx.Node:
        """Put the rows of earlier calls before a value's own, and keep all of them in the cache for later calls.

        Two such values, keys and values, are a layer of the cache; a pass makes an even number of them.

        Args:
            value: (B, heads, S, features).
            like: the model's input of earlier rows (see `is_cached`) that there are as many of: (B, ..., P, ...).

        Returns:
            (B, heads, P + S, features); in a first call the value itself.
        """
        (batch, _, rows, _), (_, heads, _, features) = like.meta["val"].shape, value.meta["val"].shape
        recorded = self.context.inference.value_of_call(
            aten.new_empty.default, (value.meta["val"], [batch, heads, rows, features]), {}
        )
        cursor = self.cursor
        earlier = self._insert("placeholder", "cache", (), {}, "cache", recorded)
        earlier.target = earlier.name
        earlier.meta["order"] = (0, len(self.nodes))
        self.cursor = cursor
        whole = self.call(aten.cat.default, [earlier, value], SEQUENCE_AXIS)
        self.cached.append(CachedRows(like.name, earlier.name, whole.name))
        return whole

    # structure

    def enlarge_size(self, node: fx.Node, argument: int, index: int | None, by: int) -> None:
        """Increase a literal size in the arguments of a call, in place."""
        self.size_increases.append(SizeIncrease(node.name, argument, index, by))
        enlarge_size(node, self.size_increases[-1])

    def disable_write(self, node: fx.Node) -> fx.Node:
        """Stop a node from writing into its operands; it is removed where nothing reads its result."""
        node.meta[WRITE_DISABLED] = True
        if node not in self.nodes:
            self.disabled_writes.append(node.name)
        return node

    def redirect(self, old: fx.Node, new: fx.Node, keep: set[fx.Node]) -> int:
        """Move the uses of `old` to `new`, except in `keep`; return how many were moved."""
        users = [user for user in old.users if user not in keep]
        for user in users:
            user.replace_input_with(old, new)
        return len(users)

    def _insert(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hint: str, value: Any
    ) -> fx.Node:
        with self.graph.inserting_after(self.cursor):
            node = self.graph.create_node(op, target, args, kwargs, name=f"{self.label}_{hint}".replace(".", "_"))
        node.meta["val"] = self._value_of(node) if value is None else value
        node.meta["label"] = self._unique_label(hint)
        node.meta["origin"] = self.label
        node.meta["order"] = (*self.order, len(self.nodes))
        self.cursor = node
        self.nodes.append(node)
        return node

    def _value_of(self, node: fx.Node) -> Any:
        """Infer the value of a new node.

        Raises:
            PeftGraphError: the operator does not take these operands.
        """
        try:
            return self.context.inference.value_of(node)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what torch says of operands
            target: Any = node.target
            operands = ", ".join(f"%{one.name} {_size(one.meta['val'])}" for one in node.all_input_nodes)
            raise PeftGraphError(
                f"{self.pass_spec} at {self.site} computes {_opname(target)}({operands}), which is not defined: "
                f"{str(error).rstrip('.')}. Leave this site out."
            ) from error

    def _unique_label(self, hint: str) -> str:
        base = f"{self.label}.{hint}"
        count = self.context.labels[base] = self.context.labels.get(base, 0) + 1
        return base if count == 1 else f"{base}#{count}"


def _floats(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point()


def enlarge_size(node: fx.Node, one: SizeIncrease, sign: int = 1) -> None:
    """Add the amount of a size increase to the literal in a call, in place; sign -1 subtracts it."""
    value: Any = node.args[one.argument]
    if one.index is None:
        node.update_arg(one.argument, value + sign * one.by)
    else:
        node.update_arg(one.argument, [n + sign * one.by if i == one.index else n for i, n in enumerate(value)])


def erase_nodes(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase nodes that have no users outside `nodes`."""
    for node in sorted(nodes, reverse=True):  # by position in the graph
        graph.erase_node(node)


def _size(value: Any) -> str:
    """Format a value for a message: a tensor as its shape and dtype."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)


def _opname(target: Callable[..., Any]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].strip("_")
    return getattr(target, "__name__", str(target))
