"""What a program keeps of the model that it was traced from, so that a module can take its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class EnclosingModel:
    """Holds the whole model of which one submodule was traced.

    Attributes:
        model: a frozen copy of the whole model; it shares the storage of the parameters.
        root: the dotted name of the submodule in it.
        assumed: arguments of the model that are False where a call does not give them.
    """

    model: nn.Module
    root: str
    assumed: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class ModelClass:
    """Holds the transformers class of a traced model, and the state of an instance.

    Attributes:
        cls: the class.
        state: what an instance of it holds beside tensors and submodules, such as its configuration; copies.
        embeddings: the path of the module that a method of the class returns, `get_input_embeddings` and
            `get_output_embeddings`.
    """

    cls: type[nn.Module]
    state: Mapping[str, Any]
    embeddings: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, eq=False)
class SubmoduleState:
    """Holds what a submodule of the traced model is besides its tensors.

    Attributes:
        cls: its class, where a module of that class can stand there without its own set-up; else `nn.Module`.
        state: its plain attributes, such as `stride` or `out_features`.
        absent: the parameters and buffers that it has a name for and no tensor, such as a `bias` of None.
        name: of the module's own class, by which trainers choose the modules to wrap.
    """

    cls: type[nn.Module]
    state: Mapping[str, Any]
    absent: tuple[str, ...]
    name: str = "Module"
