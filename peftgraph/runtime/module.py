"""Program -> nn.Module: a module with the model's own signature, output type and parameter names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.errors import PeftGraphError
from peftgraph.ir.modes import written_buffers
from peftgraph.ir.program import ProgramData
from peftgraph.ir.source_model import SubmoduleState
from peftgraph.ir.tensor_table import TensorEntry
from peftgraph.runtime.block_module import disable_recomputation, enable_recomputation
from peftgraph.runtime.block_regions import BlockRegion
from peftgraph.runtime.copying import NotPicklable
from peftgraph.runtime.execution import Execution
from peftgraph.runtime.sharding import compute_dtype, gathered_holders, is_sharded, local_device, mark_elsewhere
from peftgraph.runtime.submodules import SubmoduleFactory
from peftgraph.runtime.training_region import TrainingOptions


class GraphModule(NotPicklable, nn.Module):
    """A program as a module.

    Only the parameters that passes added (or made trainable) require grad. They are shared with the program, as are
    buffers that training writes, so that training is seen by `pg.fold`; frozen weights share storage with the traced
    model.
    `train()` and `eval()` switch every dropout; `to()` moves literals along with the parameters. Each block is a
    submodule at its own path. What is the module's own begins with `_peftgraph`, so that the model's parts may have any
    name.
    """

    def __init__(
        self, program: ProgramData, blocks: Sequence[BlockRegion] = (), options: TrainingOptions | None = None
    ) -> None:
        nn.Module.__init__(self)  # beside another class of modules, none of that one's own set-up
        self._peftgraph = Execution(program, blocks, options)
        self._peftgraph_register(program.table, program.submodules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph with the traced model's own arguments and return its own output type.

        Raises:
            CallError: the graph was not traced for these arguments.
        """
        return self._peftgraph_run(self._peftgraph.signature.bind(args, kwargs))

    def _peftgraph_run(self, tensors: Sequence[Tensor | None]) -> Any:
        """Return the outputs for the tensors of a call in placeholder order; None for an input that it omits."""
        missing = self._peftgraph.missing(tensors)
        if not is_sharded(self):
            self._peftgraph_prepare(missing)
            return self._peftgraph.run(self, tensors, missing)
        run = self._peftgraph
        run.move(compute_dtype(self, run.target[0]), local_device(self, run.target[1]))
        with gathered_holders(self):
            if torch.is_grad_enabled():
                mark_elsewhere(run.trainable)
            self._peftgraph_prepare(missing)
            return run.run(self, tensors, missing)

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
            PeftGraphError: the program has no blocks, or an option is not supported.
        """
        enable_recomputation(
            self, self._peftgraph.title, dict(activation_checkpointing_kwargs or {}), every_n_layers, offload
        )

    def activation_checkpointing_disable(self) -> None:
        """From now on, training keeps what the gradients need."""
        disable_recomputation(self)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Enable activation checkpointing: the older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Disable activation checkpointing: the older name of `activation_checkpointing_disable`."""
        disable_recomputation(self)

    def extra_repr(self) -> str:
        """Return the inputs and the number of trainable parameters."""
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"{self._peftgraph.title}: {self._peftgraph.signature.describe()}; {count:,} trainable parameters"

    @torch.compiler.assume_constant_result  # torch.compile runs it while it traces, and reads what it has left
    def _peftgraph_prepare(self, missing: frozenset[str]) -> None:
        self._peftgraph.prepare(self, missing)

    def _peftgraph_register(self, table: Mapping[str, TensorEntry], known: Mapping[str, SubmoduleState]) -> None:
        run = self._peftgraph
        written = {id(table[name].tensor) for name in written_buffers(run.graph)}
        made: dict[int, nn.Parameter] = {}  # tied entries become one parameter
        copies: dict[int, Tensor] = {}  # and one buffer
        children = SubmoduleFactory(self, known, {block.path for block in run.blocks})
        children.make_all()
        for name, entry in table.items():
            if entry.quantised is not None:
                continue  # its codes are stored in its place
            path, _, leaf = name.rpartition(".")
            owner = children.at(path)
            if entry.kind == "parameter":
                shared = entry.tensor if isinstance(entry.tensor, nn.Parameter) else None
                parameter = nn.Parameter(entry.tensor, requires_grad=False) if shared is None else shared
                owner.register_parameter(leaf, made.setdefault(id(entry.tensor), parameter))
            else:
                tensor = entry.tensor
                if entry.is_state:  # shared with the program, as parameters are
                    run.state[name] = tensor
                elif id(tensor) in written:
                    tensor = copies.setdefault(id(tensor), tensor.clone())
                owner.register_buffer(leaf, tensor, persistent=entry.persistent)
            if entry.kind == "constant" or entry.keeps_dtype:
                run.constants.append(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphModule:
        run = self._peftgraph
        dtype, device = run.target
        probe = fn(torch.empty(0, dtype=dtype, device=device))
        if probe.dtype != dtype and not run.can_change_dtype:
            raise PeftGraphError(
                f"{run.title} mixes floating dtypes, so it is not known which casts of its code follow its "
                f"weights; it cannot be moved to {probe.dtype}. Convert the model first and trace it again."
            )
        constants = {name: self.get_buffer(name) for name in run.constants}
        super()._apply(fn, recurse)
        for name, before in constants.items():  # tensor literals of the code move, but keep their own dtype
            path, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype != before.dtype:
                setattr(self.get_submodule(path), leaf, before.to(moved.device))
        for name, held in run.state.items():  # moved in place, as parameters are: the program sees what training does
            path, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved is not held and moved.device.type != "meta":
                held.data = moved
                setattr(self.get_submodule(path), leaf, held)
        run.move(probe.dtype, probe.device)
        return self
