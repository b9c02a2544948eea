"""From an exported program to the canonical graph.

Stored tensors become `get_attr` nodes, each tied tensor under the name that its user's module calls it; no_grad, autocast
and checkpoint sub-graphs are inlined; guards, asserts and unused inputs are gone; experts' grouped products have one form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from peftgraph.errors import TraceError
from peftgraph.ir.dead import drop_dead

aten = torch.ops.aten
STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
DROPPED = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg, aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default}  # fmt: skip
WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint", "wrap_activation_checkpoint")


def canonical(exported: ExportedProgram, aliases: Mapping[str, Sequence[str]]) -> fx.Graph:
    """The canonical graph of `exported`.

    Args:
        exported: the exported program.
        aliases: for every stored tensor's name, all names it is tied under.

    Raises:
        TraceError: the graph mutates its inputs or holds something that is not a tensor.
    """
    return _Normaliser(exported, aliases).run()


class _Normaliser:
    def __init__(self, exported: ExportedProgram, aliases: Mapping[str, Sequence[str]]) -> None:
        self.exported = exported
        self.aliases = aliases
        self.graph = fx.Graph()
        self.fetched: dict[str, fx.Node] = {}
        self.names = {spec.arg.name: str(spec.target) for spec in exported.graph_signature.input_specs if spec.kind in STORED}

    def run(self) -> fx.Graph:
        self._check_signature()
        self._inline(self.exported.graph, {}, self.exported.graph_module)
        self._canonical_experts()
        drop_dead(self.graph)
        return self.graph

    def _check_signature(self) -> None:
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind not in (*STORED, InputKind.USER_INPUT):
                raise TraceError(f"The model holds {spec.target!r}, a {spec.kind.name.lower()}, which a graph cannot store.")
        for spec in self.exported.graph_signature.output_specs:
            if spec.kind is OutputKind.USER_INPUT_MUTATION:
                raise TraceError(f"The model writes into its input {spec.target!r}. Let it work on a copy.")

    def _inline(self, source: fx.Graph, env: dict[fx.Node, Any], owner: torch.nn.Module) -> Any:
        for node in source.nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda operand: env[operand])
                if source is self.exported.graph:
                    self._output(result)
                return result
            if node not in env:
                env[node] = self._convert(node, env, owner)
        raise AssertionError("a graph without an output")

    def _convert(self, node: fx.Node, env: dict[fx.Node, Any], owner: torch.nn.Module) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            value = getattr(owner, str(node.target))
            if isinstance(value, torch.nn.Module):
                return value
            raise TraceError(f"The graph stores {node.target!r} outside of the model's state.")
        if node.target in DROPPED:
            return None
        if getattr(node.target, "__name__", "") in WRAPPERS:
            return self._inline_call(node, env)
        if node.target is torch.ops.higher_order.cond:
            raise TraceError("The model branches with torch.cond, which passes cannot rewrite yet.")
        if isinstance(source := _getitem_source(node, env), list | tuple):
            return source[node.args[1]]  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self._copy(node, env)

    def _inline_call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        operands = [env[operand] if isinstance(operand, fx.Node) else operand for operand in node.args]
        position = next(i for i, operand in enumerate(operands) if isinstance(operand, torch.nn.Module))
        body = operands[position]
        assert isinstance(body, fx.GraphModule)
        inner = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        return self._inline(body.graph, dict(zip(inner, operands[position + 1 :], strict=True)), body)

    def _placeholder(self, node: fx.Node) -> Any:
        if node.name in self.names:
            return self.names[node.name]  # fetched at its use, under the name its user knows
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return value  # a Python constant of the traced call
        new = self.graph.placeholder(node.name)
        new.meta = {"val": value}
        return new

    def _copy(self, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
        def operand(old: fx.Node) -> Any:
            new = env[old]
            return self._fetch(new, old, node) if old.name in self.names and old.op == "placeholder" else new

        new = self.graph.node_copy(node, operand)
        new.meta = {key: node.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in node.meta}
        return new

    def _fetch(self, name: str, placeholder: fx.Node, user: fx.Node) -> fx.Node:
        name = self._known_as(name, user)
        if name not in self.fetched:
            first = next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
            with self.graph.inserting_before(first) if first else self.graph.inserting_after():
                self.fetched[name] = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            self.fetched[name].meta = {"val": placeholder.meta["val"]}
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

    def _output(self, result: Any) -> None:
        kept = [
            value
            for spec, value in zip(self.exported.graph_signature.output_specs, result, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT
        ]
        for i, value in enumerate(kept):
            if isinstance(value, str):  # a stored tensor is returned as it is
                kept[i] = self._fetch(value, next(n for n in self.exported.graph.nodes if self.names.get(n.name) == value), self.exported.graph.output_node())  # fmt: skip
        self.graph.output(kept)

    def _canonical_experts(self) -> None:
        """Grouped products take the form that every dtype and device runs; lowering may choose a faster one."""
        native = getattr(aten, "_grouped_mm", None)
        for node in list(self.graph.nodes):
            if native is not None and node.target is native.default:
                with self.graph.inserting_before(node):
                    new = self.graph.call_function(torch.ops.transformers.grouped_mm_fallback.default, node.args[:3])
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)


def _getitem_source(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    if getattr(node.target, "__name__", "") != "getitem" or not isinstance(node.args[0], fx.Node):
        return None
    return env.get(node.args[0])
