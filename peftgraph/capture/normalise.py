"""From an exported program to the canonical graph.

Stored tensors become `get_attr` nodes, each tied tensor under the name that its user's module calls it;
no_grad, autocast and checkpoint sub-graphs are inlined; guards and asserts are gone; experts' grouped
products have one form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from peftgraph.capture.autograd_functions import RecordedCall, add_autograd_call
from peftgraph.capture.diagnosis import line_of_nodes
from peftgraph.errors import TraceError
from peftgraph.ir.dead_code import remove_dead_nodes, writes_in_place

aten = torch.ops.aten
STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
DROPPED = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
VMAP = "torch._functorch.predispatch"  # the module of the calls that enter and leave vmap
# Operators that run a sub-graph: name -> how many arguments stand before it.
WRAPPERS = {
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
    "tag_activation_checkpoint": 0,
    "wrap_activation_checkpoint": 0,
}


def normalise_graph(
    exported: ExportedProgram, aliases: Mapping[str, Sequence[str]], functions: Sequence[RecordedCall] = ()
) -> fx.Graph:
    """Return the canonical graph of `exported`.

    Args:
        exported: the exported program.
        aliases: for every stored tensor's name, all names it is tied under.
        functions: the recorded calls of custom autograd functions, by number.

    Raises:
        TraceError: the graph writes into its inputs, runs under autocast, branches, or contains a constant that is no
            tensor.
    """
    return _Normaliser(exported, aliases, functions).run()


@dataclass(frozen=True)
class _Stored:
    """A stored tensor that is fetched at its use, under the name its user knows."""

    name: str
    value: Tensor
    differentiable: bool


class _Normaliser:
    def __init__(
        self, exported: ExportedProgram, aliases: Mapping[str, Sequence[str]], functions: Sequence[RecordedCall]
    ) -> None:
        self.exported = exported
        self.aliases = aliases
        self.functions = functions
        self.graph = fx.Graph()
        self.first: fx.Node | None = None  # the first computing node: stored tensors are fetched before it
        self.fetched: dict[str, fx.Node] = {}
        self.differentiable: set[fx.Node] = set()
        self.stored = {
            spec.arg.name: spec
            for spec in exported.graph_signature.input_specs
            if spec.kind in STORED and isinstance(spec.target, str)
        }

    def run(self) -> fx.Graph:
        self._check_signature()
        results = self._inline(self.exported.graph, {}, self.exported.graph_module)
        specs = self.exported.graph_signature.output_specs
        kept = [v for spec, v in zip(specs, results, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        user = self.exported.graph.output_node()
        self.graph.output([self._fetch(v, user) if isinstance(v, _Stored) else v for v in kept])
        self._canonical_experts()
        remove_dead_nodes(self.graph)
        return self.graph

    def _check_signature(self) -> None:
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind not in (*STORED, InputKind.USER_INPUT):
                kind = spec.kind.name.lower()
                raise TraceError(f"The model holds {spec.target!r}, a {kind}, which a graph cannot store.")

    def _inline(self, source: fx.Graph, env: dict[fx.Node, Any], owner: nn.Module) -> list[Any]:
        """Copy the nodes of `source` and return its results; `env` maps its nodes to their copies."""
        for node in source.nodes:
            if node.op == "output":
                results = node.args[0]
                assert isinstance(results, list | tuple)
                return [env[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in results]
            if node not in env:
                env[node] = self._convert(node, env, owner)
        raise AssertionError("a graph without an output")

    def _convert(self, node: fx.Node, env: dict[fx.Node, Any], owner: nn.Module) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            value = getattr(owner, str(node.target))
            if isinstance(value, nn.Module):
                return value
            raise TraceError(f"The graph stores {node.target!r} outside of the model's state.")
        if node.target in DROPPED:
            return None
        if node.target is torch.ops.peftgraph.autograd_function.default:
            return self._function(node, env)
        name = getattr(node.target, "__name__", "")
        if name in WRAPPERS:
            return self._inline_call(node, name, env)
        if getattr(node.target, "__module__", "") == VMAP:
            place = line_of_nodes(dropwhile(lambda one: one is not node, node.graph.nodes))
            raise TraceError(
                "The model runs a part of itself under torch.vmap, whose levels are no part of a graph.\n"
                f"{place}  what to do: Write it with a batch dimension of its own."
            )
        if node.target is torch.ops.higher_order.cond:
            raise TraceError("The model branches with torch.cond, which passes cannot rewrite yet.")
        if name == "getitem" and isinstance(node.args[0], fx.Node):
            source = env[node.args[0]]
            if isinstance(source, list | tuple):  # one result of an inlined sub-graph
                return source[node.args[1]]  # pyright: ignore[reportArgumentType, reportCallIssue]
        return self._copy(node, env)

    def _inline_call(self, node: fx.Node, name: str, env: dict[fx.Node, Any]) -> Any:
        options = node.args[: WRAPPERS[name]]
        body, *operands = (env[a] if isinstance(a, fx.Node) else a for a in node.args[WRAPPERS[name] :])
        assert isinstance(body, fx.GraphModule)
        if name == "wrap_with_autocast" and options[2]:
            raise TraceError(
                f"The model runs a part of itself under torch.autocast({options[0]!r}, {options[1]}), whose "
                f"casts are no part of a graph.\n{line_of_nodes(body.graph.nodes)}"
                "  what to do: Write the casts out with .to(dtype), or trace that part without autocast."
            )
        inner = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        results = self._inline(body.graph, dict(zip(inner, operands, strict=True)), body)
        if name == "wrap_with_set_grad_enabled" and not options[0]:
            results = [self._without_gradient(value) for value in results]
        return results

    def _without_gradient(self, value: Any) -> Any:
        """Detach an output of a no_grad region where a gradient could flow through it."""
        if not isinstance(value, fx.Node) or value not in self.differentiable:
            return value
        new = self.graph.call_function(aten.detach.default, (value,))
        new.meta = dict(value.meta)
        return new

    def _placeholder(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        spec = self.stored.get(node.name)
        if spec is not None:
            assert isinstance(value, Tensor)
            differentiable = spec.kind is InputKind.PARAMETER and value.is_floating_point()
            return _Stored(str(spec.target), value, differentiable)
        if not isinstance(value, Tensor):
            return value  # a Python constant of the traced call
        new = self.graph.placeholder(node.name)
        new.meta = {"val": value}
        if value.is_floating_point():
            self.differentiable.add(new)
        return new

    def _operand(self, old: Any, user: fx.Node, env: dict[fx.Node, Any]) -> Any:
        new = env[old] if isinstance(old, fx.Node) else old
        return self._fetch(new, user) if isinstance(new, _Stored) else new

    def _function(self, node: fx.Node, env: dict[fx.Node, Any]) -> list[fx.Node]:
        """Add the call of a custom autograd function, as a node whose target is that function."""
        number, tensors, sizes = node.args
        assert isinstance(number, int)
        assert isinstance(tensors, list | tuple)
        assert isinstance(sizes, list | tuple)
        given = [[self._operand(value, node, env) for value in values] for values in (tensors, sizes)]
        call, results = add_autograd_call(self.graph, self.functions[number], *given)
        values = node.meta["val"]
        for new, value in [(call, tuple(values)), *zip(results, values, strict=True)]:
            new.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
            new.meta["val"] = value
        self.first = self.first or call
        if not self.differentiable.isdisjoint(call.all_input_nodes):
            self.differentiable.update(new for new in (call, *results) if _is_floating(new))
        return results

    def _copy(self, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
        new = self.graph.node_copy(node, lambda old: self._operand(old, node, env))
        new.meta = {key: node.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in node.meta}
        self.first = self.first or new
        if writes_in_place(new) and _is_batch_norm(node):
            new.meta["training_only"] = True  # it counts batches
        if _is_floating(new) and not self.differentiable.isdisjoint(new.all_input_nodes):
            self.differentiable.add(new)
        return new

    def _fetch(self, stored: _Stored, user: fx.Node) -> fx.Node:
        name = self._known_as(stored.name, user)
        if name not in self.fetched:
            place = self.graph.inserting_before(self.first) if self.first else self.graph.inserting_after()
            with place:
                node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            node.meta = {"val": stored.value}
            self.fetched[name] = node
            if stored.differentiable:
                self.differentiable.add(node)
        return self.fetched[name]

    def _known_as(self, name: str, user: fx.Node) -> str:
        """Among the names of a tied tensor, the one inside the module that computes `user`."""
        names = self.aliases.get(name, (name,))
        if len(names) == 1:
            return name
        stack = [path for path, _ in (user.meta.get("nn_module_stack") or {}).values()]
        for path in reversed(stack):
            for candidate in names:
                if candidate.rpartition(".")[0] == path:
                    return candidate
        return name

    def _canonical_experts(self) -> None:
        """Bring grouped products into the form that runs on every dtype and device; the runtime may choose a faster
        one."""
        native = getattr(aten, "_grouped_mm", None)
        fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
        if native is None or fallback is None:
            return
        for node in list(self.graph.nodes):
            if node.target is native.default:
                with self.graph.inserting_before(node):
                    new = self.graph.call_function(fallback.default, node.args[:3])
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)


def _is_floating(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _is_batch_norm(node: fx.Node) -> bool:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return bool(stack) and "torch.nn.modules.batchnorm." in str(stack[-1][1])
