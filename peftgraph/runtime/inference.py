"""Runs a program in evaluation with code for latency (`peftgraph.optimise.inference_graphs`).

What stored tensors alone determine is computed once, and again when one of them changed; what sizes determine is
computed once for each combination of sizes. At the first call of a kind outputs are compared with the plain code's.
Where they differ, or the plain code must run, `run` returns None, and `refusals` has the reasons.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules import module as modules

from peftgraph.ir.graphs import copy_graph
from peftgraph.ir.shape_inference import fake_mode_of, infer_values
from peftgraph.optimise.inference_graphs import make_inference_graph
from peftgraph.optimise.stages import StagedGraph
from peftgraph.runtime.block_module import BlockModule
from peftgraph.runtime.codegen import Code, compile_graph
from peftgraph.runtime.region_check import agree

SIZES_KEPT = 4  # combinations of sizes whose masks and tables are kept
ROUNDING = 0.1  # of the largest output: no rounding differs by more, in half precision either
_version = operator.attrgetter("_version")


class StoredTensors:
    """Tensors of a module, and whether they are still what they were.

    A change is seen by the identity of modules and tensors, by torch's count of writes, and by the memory address. A
    write through `.data` changes none of these: `forget` is for whoever does that.
    """

    def __init__(self, net: nn.Module, paths: Sequence[str]) -> None:
        self.places: list[tuple[dict[str, Any], str]] = []
        self._parents: dict[tuple[int, str], tuple[dict[str, Any], str, nn.Module]] = {}
        for path in paths:
            *names, leaf = path.split(".")
            owner = net
            for name in names:
                child: Any = owner._modules[name]
                self._parents[id(owner), name] = (owner._modules, name, child)
                owner = child
            self.places.append((owner._parameters if leaf in owner._parameters else owner._buffers, leaf))
        self.tensors: list[Tensor] = [slots[leaf] for slots, leaf in self.places]
        self.usable = all(type(one) in (Tensor, nn.Parameter) and not one.is_inference() for one in self.tensors)
        self._slots, self._leaves = [slots for slots, _ in self.places], [leaf for _, leaf in self.places]
        self._owners = [one[0] for one in self._parents.values()]
        self._names = [one[1] for one in self._parents.values()]
        self._children = [one[2] for one in self._parents.values()]
        if self.usable:
            self._versions = list(map(_version, self.tensors))
            self._addresses = list(map(Tensor.data_ptr, self.tensors))

    def are_unchanged(self) -> bool:
        """Return True if no tensor was replaced or written to."""
        return (
            all(map(operator.is_, map(dict.get, self._slots, self._leaves), self.tensors))
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._children))
            and list(map(_version, self.tensors)) == self._versions
            and list(map(Tensor.data_ptr, self.tensors)) == self._addresses
        )


@dataclass
class PreparedCode:
    """The code of one kind of call, and what of it is kept between calls.

    Attributes:
        known: by the sizes of a call, the values that the code reads beside its inputs.
    """

    staged: StagedGraph
    stored: Code
    sized: Code
    rest: Code
    sizes: tuple[tuple[int, int], ...]
    tensors: StoredTensors
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    known: dict[tuple[int, ...], tuple[Any, ...]] = field(default_factory=dict[tuple[int, ...], tuple[Any, ...]])

    def compute_stored(self, net: nn.Module) -> None:
        """Compute what stored tensors determine."""
        if self.values:
            self.tensors = StoredTensors(net, list(self.staged.sources.values()))
        self.known.clear()
        self.values = dict(zip(self.staged.sources, self.tensors.tensors, strict=True))
        part = self.staged.stored
        found = self.stored(None, *(self.values[name] for name in part.reads))
        self.values |= dict(zip(part.makes, found, strict=True))

    def for_sizes(self, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        """Return what the code reads beside its inputs in a call with these sizes."""
        part = self.staged.sized
        values: dict[str, Any] = self.values | dict(zip(self.staged.sizes, sizes, strict=True))
        values |= dict(zip(part.makes, self.sized(None, *(values[name] for name in part.reads)), strict=True))
        for name in self.staged.masks & values.keys():
            if values[name].dtype == torch.bool and bool(values[name].all()):
                values[name] = None  # nothing is hidden
        if len(self.known) >= SIZES_KEPT:
            del self.known[next(iter(self.known))]
        self.known[sizes] = tuple(values[name] for name in self.staged.rest.reads)
        return self.known[sizes]


class InferenceCode:
    """Code for latency of one graph of a program.

    Attributes:
        graph: in evaluation mode.
        plain: its plain code, called with the module.
        refusals: why the plain code runs instead, if it does.
    """

    def __init__(self, graph: fx.Graph, plain: Code, title: str) -> None:
        self.graph, self.plain, self.title = graph, plain, title
        self.prepared: PreparedCode | None = None
        self.refusals: list[str] = []
        self._checked: set[Any] = set()
        self._blocks: list[nn.Module] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> InferenceCode:
        twin = memo[id(self)] = type(self)(self.graph, self.plain, self.title)  # the tensors are another module's
        return twin

    def forget(self) -> None:
        """Compute everything again that stored tensors determine."""
        if self.prepared is not None:
            self.prepared.values.clear()
            self.prepared.known.clear()

    def run(self, net: nn.Module, inputs: Sequence[Any]) -> list[Any] | None:
        """Return the outputs of a call; None if the plain code must run."""
        if self.refusals or _is_observed():
            return None
        code = self.prepared
        if code is None or not code.values or not code.tensors.are_unchanged():
            with torch.inference_mode(False), torch.no_grad():
                if (code := self._prepare(net, inputs)) is None:
                    return None
        if _needs_gradients(code.tensors.tensors, inputs) or _is_hooked(self._blocks):
            return None
        sizes = tuple([inputs[i].shape[axis] for i, axis in code.sizes])
        with torch.no_grad():
            read = code.known.get(sizes)
            if read is None:
                with torch.inference_mode(False):
                    read = code.for_sizes(sizes)
            kind = tuple([(one.dtype, 1 in one.shape) for one in inputs])
            if kind not in self._checked:
                return self._checked_outputs(net, code, read, inputs, kind)
            return code.rest(None, *read, *inputs)

    def _prepare(self, net: nn.Module, inputs: Sequence[Any]) -> PreparedCode | None:
        code = self.prepared
        if code is None:
            try:
                staged = make_inference_graph(_with_dtypes_of(self.graph, net, inputs))
            except NotImplementedError as error:
                self.refusals.append(f"{error}")
                return None
            stored, sized, rest = (
                compile_graph(part.graph, f"{self.title} {name}")
                for name, part in (("stored", staged.stored), ("sizes", staged.sized), ("latency", staged.rest))
            )
            tensors = StoredTensors(net, list(staged.sources.values()))
            if not tensors.usable:
                self.refusals.append("a stored tensor has no count of writes: it is an inference tensor or a subclass")
                return None
            code = self.prepared = PreparedCode(staged, stored, sized, rest, tuple(staged.sizes.values()), tensors)
            self._blocks = [one for one in net.modules() if isinstance(one, BlockModule)]
        code.compute_stored(net)
        return code

    def _checked_outputs(
        self, net: nn.Module, code: PreparedCode, read: Sequence[Any], inputs: Sequence[Any], kind: Any
    ) -> list[Any] | None:
        """Compare the outputs of a call with the plain code's."""
        found, wanted = code.rest(None, *read, *inputs), self.plain(net, *inputs)
        count = len(self.graph.nodes)
        for number, (ours, plain) in enumerate(zip(found, wanted, strict=True)):
            if not agree(plain, ours, count, ROUNDING):
                self.refusals.append(f"output {number} is not that of the plain code")
                return None
        self._checked.add(kind)
        return found


def _with_dtypes_of(graph: fx.Graph, net: nn.Module, inputs: Sequence[Any]) -> fx.Graph:
    """Return a copy of a graph whose recorded dtypes are those of a module and of the inputs of a call."""
    new, mode = copy_graph(graph), fake_mode_of(graph)
    given = iter(inputs)
    for node in new.nodes:
        if node.op not in ("get_attr", "placeholder"):
            continue
        real = next(given) if node.op == "placeholder" else _tensor_at(net, str(node.target))
        known = node.meta["val"]
        if isinstance(real, Tensor) and (known.dtype != real.dtype or known.device != real.device):
            with mode:
                node.meta["val"] = torch.empty_strided(
                    known.shape, known.stride(), dtype=real.dtype, device=real.device
                )
    infer_values(new.nodes, mode)
    return new


def _tensor_at(net: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    return getattr(net.get_submodule(owner), leaf)


def _needs_gradients(tensors: Sequence[Tensor], inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in (*tensors, *inputs) if isinstance(one, Tensor))


def _is_observed() -> bool:
    """Return True if torch compiles, transforms, casts or records the calls, which then are to be the plain ones."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _is_hooked(blocks: Sequence[nn.Module]) -> bool:
    """Return True if someone looks at what enters or leaves a block: the code for latency calls none."""
    return bool(
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or any(one._forward_hooks or one._forward_pre_hooks for one in blocks)
    )
