"""What modules must be to stand in the places of a model and of its submodules."""

from __future__ import annotations

import copy
import enum
import sys
from typing import Any

import torch
from torch import Tensor, nn

from peftgraph.ir.source_model import ModelClass, SubmoduleState

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def model_class_of(model: nn.Module) -> ModelClass | None:
    """Return the class of a transformers model and its attributes other than tensors and modules; None for other
    models."""
    library = sys.modules.get("transformers.modeling_utils")  # imported, if the model is one of its classes
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    own = vars(nn.Module())
    state = {name: value for name, value in vars(model).items() if name not in own and not isinstance(value, Tensor)}
    state.pop("forward", None)  # one that was put on the instance, such as a hook's
    return ModelClass(type(model), copy.deepcopy(state), _embeddings_of(model))


def _embeddings_of(model: Any) -> dict[str, str]:
    """Return the paths of the embeddings that a transformers model names; it need not name any."""
    found: dict[str, str] = {}
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, method)()
        except (NotImplementedError, AttributeError):  # how models say that they have none
            continue
        path = next((path for path, one in model.named_modules() if one is module), None)
        if path:
            found[method] = path
    return found


def submodule_states(model: nn.Module) -> dict[str, SubmoduleState]:
    """Return the submodules of a model, by path, in its own order, with what other code may read of them."""
    library: Any = sys.modules.get("transformers.configuration_utils")
    configurations = () if library is None else (library.PreTrainedConfig,)
    memo: dict[int, Any] = {}  # what several share, such as a configuration, is copied once
    own = vars(nn.Module()).keys()
    found: dict[str, SubmoduleState] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            state = {
                name: copy.deepcopy(value, memo)
                for name, value in vars(module).items()
                if name not in own and (_is_plain(value) or isinstance(value, configurations))
            }
            slots = {**module._parameters, **module._buffers}
            absent = tuple(name for name, value in slots.items() if value is None)
            found[path] = SubmoduleState(_class_of(module), state, absent, type(module).__name__)
    return found


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Return the module's class if it is a torch.nn layer that computes by itself, or a plain container of modules."""
    cls = type(module)
    leaf = cls.__module__.startswith("torch.nn.modules.") and not module._modules and not isinstance(module, nn.RNNBase)
    return cls if leaf or cls in CONTAINERS else nn.Module


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(one) for key, one in value.items())
    return isinstance(value, PLAIN)
