"""What a module must be to stand in the place of a model of transformers."""

from __future__ import annotations

import copy
import sys

from torch import Tensor, nn

from peftgraph.ir.program import Host


def host_of(model: nn.Module) -> Host | None:
    """The class of a transformers model and what it holds beside tensors and modules; None for any other model."""
    library = sys.modules.get("transformers.modeling_utils")  # imported, if the model is one of its classes
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    own = vars(nn.Module())
    state = {name: value for name, value in vars(model).items() if name not in own and not isinstance(value, Tensor)}
    state.pop("forward", None)  # one that was put on the instance, such as a hook's
    return Host(type(model), copy.deepcopy(state))
