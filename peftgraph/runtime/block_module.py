"""The module of one block, and the choice of computing it again for the gradients instead of keeping its values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftgraph.errors import PeftGraphError
from peftgraph.runtime.codegen import Code
from peftgraph.runtime.copying import NotPicklable
from peftgraph.runtime.training_region import TrainingRegion


class BlockModule(NotPicklable, nn.Module):
    """A block of a program: its tensors under their own names, and the code of each graph that runs it.

    Attributes:
        gradient_checkpointing: whether training computes the block again; transformers looks for this name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._peftgraph_codes: dict[str, Code] = {}
        self._peftgraph_regions: dict[str, TrainingRegion] = {}
        self.gradient_checkpointing = False
        self._peftgraph_options: dict[str, Any] = {}

    def forward(self, graph: str, *values: Any) -> Any:
        """Run the code of a graph on the values that the block reads from outside."""
        code = self._peftgraph_codes[graph]
        if not (self.training and torch.is_grad_enabled()):
            return code(self, *values)
        region = self._peftgraph_regions.get(graph)
        if region is not None and not self._peftgraph_options and not torch.compiler.is_compiling():
            outputs = region(self, *values, recompute=self.gradient_checkpointing)
            if outputs is not None:
                return outputs
        if self.gradient_checkpointing:
            return checkpoint(code, self, *values, use_reentrant=False, **self._peftgraph_options)
        return code(self, *values)


def enable_recomputation(net: nn.Module, title: str, options: dict[str, Any], every: int, offload: bool) -> None:
    """Recompute every `every`-th block of a module in the backward pass instead of keeping its values.

    Raises:
        PeftGraphError: it has no blocks, or an option is not supported.
    """
    if options.pop("use_reentrant", False):
        raise PeftGraphError(
            "Reentrant checkpoints give no gradients where a block's inputs need none, as those of the first block "
            "of a frozen model. Leave use_reentrant out, or set it to False."
        )
    if offload:
        raise PeftGraphError("What enters a block stays where it was computed: offload is not offered.")
    if every < 1:
        raise PeftGraphError(f"every_n_layers must be at least 1, got {every}.")
    blocks = list(_blocks(net))
    if not blocks:
        raise PeftGraphError(f"{title} has no repeated blocks with modules of their own to compute again.")
    for i, block in enumerate(blocks):
        block.gradient_checkpointing, block._peftgraph_options = i % every == 0, options


def disable_recomputation(net: nn.Module) -> None:
    """Keep the values of all blocks for the backward pass."""
    for block in _blocks(net):
        block.gradient_checkpointing, block._peftgraph_options = False, {}


def _blocks(net: nn.Module) -> Iterator[BlockModule]:
    return (module for module in net.modules() if isinstance(module, BlockModule))
