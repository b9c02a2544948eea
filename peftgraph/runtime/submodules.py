"""Modules in the places of a model's submodules: of their classes where they can be, with what code reads of them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NoReturn

from torch import nn

from peftgraph.errors import CallError
from peftgraph.ir.source_model import SubmoduleState
from peftgraph.runtime.block_module import BlockModule


class SubmoduleFactory:
    """Makes the modules under one root, at any path, when they are asked for.

    Args:
        root: the module of a program.
        known: what the submodules of the traced model were.
        blocks: the paths of its blocks.
    """

    def __init__(self, root: nn.Module, known: Mapping[str, SubmoduleState], blocks: Set[str]) -> None:
        self._root, self._known, self._blocks = root, known, blocks
        self._block_classes: dict[str, type[BlockModule]] = {}

    def make_all(self) -> None:
        """Make every submodule that the model had, in its order, including those without tensors."""
        for path in self._known:
            self.at(path)

    def at(self, path: str) -> nn.Module:
        """Return the module at a path, which is made if it is missing."""
        if not path:
            return self._root
        parent, _, leaf = path.rpartition(".")
        owner = self.at(parent)
        child = owner._modules.get(leaf)
        if child is None:
            child = owner._modules[leaf] = self._made(path)
        return child

    def _made(self, path: str) -> nn.Module:
        known = self._known.get(path)
        if path in self._blocks:
            made: nn.Module = self._block_class("BlockModule" if known is None else known.name)()
        elif known is None or known.cls is nn.Module:
            made = nn.Module()
        else:
            made = _like(known.cls)
        if known is not None:
            vars(made).update({name: value for name, value in known.state.items() if name not in vars(made)})
            made._parameters.update(dict.fromkeys(known.absent))
        return made

    def _block_class(self, name: str) -> type[BlockModule]:
        """Return the class of blocks under the name of the model's own, by which trainers find what to wrap."""
        return self._block_classes.setdefault(name, type(name, (BlockModule,), {"__module__": BlockModule.__module__}))


def _like(cls: type[nn.Module]) -> nn.Module:
    """Return an empty module of a class; it computes nothing itself, since the graph of the whole model does."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise CallError(
            f"A {cls.__name__} inside of a program's module holds its weights and does not compute by itself: the "
            "graph of the whole model does, with what passes put there. Call the whole module."
        )

    made = object.__new__(type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__}))
    nn.Module.__init__(made)
    return made
