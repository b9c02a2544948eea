"""A program of a submodule as the whole model: the submodule runs the program, the rest runs as it was written.

The result is a copy of the model in which the traced submodule is replaced by one of the same class, whose forward
runs the graph. Both look up their tensors in the same place, so names, ties and moves stay those of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peftgraph.ir.program import ProgramData
from peftgraph.ir.source_model import EnclosingModel
from peftgraph.runtime.block_regions import BlockRegion
from peftgraph.runtime.copying import NotPicklable
from peftgraph.runtime.module import GraphModule
from peftgraph.runtime.training_region import TrainingOptions


def embed_in_model(
    program: ProgramData, blocks: Sequence[BlockRegion], around: EnclosingModel, options: TrainingOptions | None = None
) -> nn.Module:
    """Return the traced model with its submodule replaced by the program; only new parameters require grad."""
    graph = GraphModule(program, blocks, options)
    memo: dict[int, Any] = {}
    parameters = list(around.model.named_parameters(remove_duplicate=False))
    # The part looks its own tensors up by name; where folding has cut a tie, the rest keeps the other one.
    for name, parameter in sorted(parameters, key=lambda item: not item[0].startswith(f"{around.root}.")):
        memo[id(parameter)] = graph.get_parameter(name)
    net = copy.deepcopy(around.model, memo)
    _serve(net.get_submodule(around.root), graph, around.root)
    assumed = dict.fromkeys(around.assumed, False)
    cls: Any = type(net)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **{**assumed, **kwargs})

    net.__class__ = _like(cls, forward=forward)
    return net.train(graph.training)


def _serve(part: nn.Module, graph: GraphModule, root: str) -> None:
    """Make `part` run `graph`, in place.

    Its modules stay, since the surrounding code may also use them (an embedding), with the tensors that the graph
    stores under `root`; modules that passes added are added to them.
    """
    known = dict(part.named_modules(remove_duplicate=False))
    for name, place in graph.get_submodule(root).named_modules():
        if name in known:
            _share(known[name], place)
        else:
            parent, _, leaf = name.rpartition(".")
            if parent in known:
                known[parent].add_module(leaf, place)
    part.__dict__["_peftgraph"] = graph  # not a child of its own: its tensors would have two names

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._peftgraph(*args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        self._peftgraph.train(mode)
        return nn.Module.train(self, mode)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        self._peftgraph._apply(fn, recurse)
        return self

    part.__class__ = _like(type(part), forward=forward, train=train, _apply=_apply)


def _share(module: nn.Module, place: nn.Module) -> None:
    """Make `module` share the tensors of `place`."""
    for slots, others in ((module._parameters, place._parameters), (module._buffers, place._buffers)):
        others.update({name: value for name, value in slots.items() if value is None})
    shared = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    module.__dict__ |= {name: getattr(place, name) for name in shared}


def _like(cls: type, **methods: Any) -> type:
    """Return a subclass of `cls` with other methods and the same name."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (NotPicklable, cls), {**names, **methods})
