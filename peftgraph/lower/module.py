"""Program -> nn.Module: a module with the model's own signature, output type and parameter names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from peftgraph.errors import PeftGraphError
from peftgraph.ir.dead import drop_dead, skip_whole_slices
from peftgraph.ir.literals import retarget
from peftgraph.ir.modes import evaluated, mutated_buffers, trained, without_inputs, without_past
from peftgraph.ir.program import Child, ProgramData, copy_graph
from peftgraph.ir.signature import Signature
from peftgraph.ir.table import Entry
from peftgraph.lower.blocks import keep, recompute
from peftgraph.lower.children import Children
from peftgraph.lower.codes import Code, compile_graph
from peftgraph.lower.copying import Copied
from peftgraph.lower.outline import outline
from peftgraph.lower.spans import Span, mark


class GraphModule(Copied, nn.Module):
    """A program as a module.

    Only the parameters that passes added (or made trainable) require grad. They are shared with the program, as are
    buffers that training writes, so that training is seen by `pg.fold`; frozen weights share storage with the traced
    model.
    `train()` and `eval()` switch every dropout; `to()` moves literals along with the parameters. Each block is a
    submodule at its own path.
    """

    def __init__(self, program: ProgramData, blocks: Sequence[Span] = ()) -> None:
        nn.Module.__init__(self)  # beside another class of modules, none of that one's own set-up
        self._signature: Signature = program.signature
        self._graph = copy_graph(program.graph)
        self._marked = program.marked
        self._target = (program.table.dtype, program.table.device)
        self._codes: dict[tuple[bool, frozenset[str]], tuple[Code, tuple[bool, ...]]] = {}
        self._sources: dict[str, Code] = {}
        self._blocks = tuple(blocks)
        mark(self._graph, self._blocks)
        self._model = program.model
        self._constants: list[str] = []
        self._state: dict[str, Tensor] = {}
        self._register(program.table, program.children)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph with the traced model's own arguments and returns its own output type.

        Raises:
            CallError: the graph was not traced for these arguments.
        """
        return self.run(self._signature.bind(args, kwargs))

    def run(self, tensors: Sequence[Tensor | None]) -> Any:
        """The outputs for the tensors of a call in placeholder order; None for what it leaves out."""
        specs = self._signature.inputs
        missing = frozenset(spec.name for spec, value in zip(specs, tensors, strict=True) if value is None)
        self._prepare(missing)
        code, kept = self._codes[self.training, missing]
        leaves = code(self, *(value for value in tensors if value is not None))
        return assemble(self._signature.outputs, leaves, kept)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """From now on, training keeps what enters a block and computes the block once more for the gradients, which
        stay the same to the bit. Methods and arguments are called as in transformers, whose loops call them.

        Args:
            activation_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint, such as `preserve_rng_state`.
            every_n_layers: the first block and every n-th after it are computed again, the others keep their values.
            offload: not offered.

        Raises:
            PeftGraphError: the program has no blocks, or something is asked that is not offered.
        """
        recompute(self, self._model, dict(activation_checkpointing_kwargs or {}), every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """From now on, training keeps what the gradients need."""
        keep(self)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        keep(self)

    def extra_repr(self) -> str:
        """The inputs and how much trains."""
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"{self._model}: {self._signature.describe()}; {count:,} trainable parameters"

    def graph_for(self, training: bool, missing: frozenset[str] = frozenset()) -> tuple[fx.Graph, tuple[bool, ...]]:
        """The graph that runs in a mode without the inputs in `missing`, and which output leaves it gives.

        Raises:
            CallError: every output depends on a missing input.
        """
        graph = trained(self._graph) if training else evaluated(self._graph)
        drop_dead(graph)
        skip_whole_slices(graph)
        return leaving_out(graph, self._signature, missing)

    @torch.compiler.assume_constant_result  # torch.compile runs it while it traces, and reads what it has left
    def _prepare(self, missing: frozenset[str]) -> None:
        """Makes the code that runs in this mode without the inputs in `missing`, once."""
        key = (self.training, missing)
        if key not in self._codes:
            graph, kept = self.graph_for(*key)
            name = "-".join(["training" if self.training else "evaluation", *sorted(missing)])
            graph = outline(graph, self._blocks, name, self._compiled, self)
            self._codes[key] = (self._compiled(graph), kept)

    def _compiled(self, graph: fx.Graph) -> Code:
        return compile_graph(graph, self._model, self._sources)

    def _register(self, table: Mapping[str, Entry], known: Mapping[str, Child]) -> None:
        written = {id(table[name].tensor) for name in mutated_buffers(self._graph)}
        made: dict[int, nn.Parameter] = {}  # tied entries become one parameter
        copies: dict[int, Tensor] = {}  # and one buffer
        children = Children(self, known, {block.path for block in self._blocks})
        children.make_all()
        for name, entry in table.items():
            path, _, leaf = name.rpartition(".")
            owner = children.at(path)
            if entry.kind == "parameter":
                shared = entry.tensor if isinstance(entry.tensor, nn.Parameter) else None
                parameter = nn.Parameter(entry.tensor, requires_grad=False) if shared is None else shared
                owner.register_parameter(leaf, made.setdefault(id(entry.tensor), parameter))
            else:
                tensor = entry.tensor
                if entry.is_state:  # shared with the program, as parameters are
                    self._state[name] = tensor
                elif id(tensor) in written:
                    tensor = copies.setdefault(id(tensor), tensor.clone())
                owner.register_buffer(leaf, tensor, persistent=entry.persistent)
            if entry.kind == "constant":
                self._constants.append(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphModule:
        dtype, device = self._target
        probe = fn(torch.empty(0, dtype=dtype, device=device))
        if probe.dtype != dtype and not self._marked:
            raise PeftGraphError(
                f"{self._model} mixes floating dtypes, so it is not known which casts of its code follow its "
                f"weights; it cannot be moved to {probe.dtype}. Convert the model first and trace it again."
            )
        constants = {name: self.get_buffer(name) for name in self._constants}
        super()._apply(fn, recurse)
        for name, before in constants.items():  # tensor literals of the code move, but keep their own dtype
            path, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype != before.dtype:
                setattr(self.get_submodule(path), leaf, before.to(moved.device))
        for name, held in self._state.items():  # moved in place, as parameters are: the program sees what training does
            path, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved is not held and moved.device.type != "meta":
                held.data = moved
                setattr(self.get_submodule(path), leaf, held)
        if (probe.dtype, probe.device) != self._target:
            self._target = (probe.dtype, probe.device)
            retarget(self._graph, *self._target)
            self._codes.clear()
            self._sources.clear()
        return self


def leaving_out(graph: fx.Graph, signature: Signature, missing: frozenset[str]) -> tuple[fx.Graph, tuple[bool, ...]]:
    """`graph` without the inputs in `missing`, and which output leaves it gives.

    Raises:
        CallError: every output depends on a missing input.
    """
    past = missing & signature.past_inputs
    if past:
        graph = without_past(graph, past)
    if missing == past:
        return graph, (True,) * len(signature.output_keys)
    return without_inputs(graph, missing - past)


def assemble(spec: pytree.TreeSpec, leaves: list[Any], kept: tuple[bool, ...]) -> Any:
    """The model's output tree; what depends on a missing input is left out, as the model does it.

    A dict or a tuple becomes shorter; any other class holds None there.
    """
    result = pytree.tree_unflatten(leaves, spec)
    if all(kept) or type(result) not in (dict, tuple, list):
        return result
    flags = pytree.tree_unflatten(list(kept), spec)
    if type(result) is dict:
        return {key: value for key, value in result.items() if _is_kept(flags[key])}
    return type(result)(value for value, flag in zip(result, flags, strict=True) if _is_kept(flag))


def _is_kept(flags: Any) -> bool:
    leaves = pytree.tree_leaves(flags)
    return any(leaves) or not leaves
