"""The methods that users of other libraries expect of a tuned module: counts of what trains, and a merged model.

They are given to a module only under names that are free: what the model's own class defines, or calls one of its
parts, stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from peftgraph.errors import PeftGraphError

N = TypeVar("N", bound=nn.Module)
OWNER = "_peftgraph_owner"

# From the tensors of a module that training moves, by name.
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Owner:
    """The program of a module, as the operations on it that these methods need.

    Attributes:
        names: of the tensors that the program shares with the module: what trains, and running statistics.
        coded: how many values are stored as codes, which are no parameters of the module.
        program: returns the program with other values of these tensors.
        merge: returns a plain model with such a program folded into it.
    """

    names: frozenset[str]
    coded: int
    program: Callable[[Tensors], Any]
    merge: Callable[..., nn.Module]


def get_nb_trainable_parameters(self: nn.Module) -> tuple[int, int]:
    """Return how many values train, and how many there are."""
    values = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
    return sum(count for count, trains in values if trains), sum(count for count, _ in values) + owner_of(self).coded


def print_trainable_parameters(self: nn.Module) -> None:
    """Print how many values train, and how many there are."""
    trainable, every = get_nb_trainable_parameters(self)
    share = 100 * trainable / every if every else 0.0
    print(f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {share:.4f}")


def merge_and_unload(self: nn.Module, **options: Any) -> nn.Module:
    """Return a plain model of the base's class with everything folded into its weights, proved as by `pg.fold`.

    The model is a copy; the traced one, the program and this module keep their own weights.

    Args:
        self: the module.
        options: those of `pg.fold`: untie, quantised and prove.

    Raises:
        NoFold: something cannot be folded exactly; every site is named with its reason.
        PeftGraphError: the traced model is not there any more, or an option is unknown.
    """
    unknown = next((name for name in options if name not in ("untie", "quantised", "prove")), None)
    if unknown is not None:
        why = " Every merge is proved to be exact." if unknown == "safe_merge" else ""
        raise PeftGraphError(f"merge_and_unload() has no option {unknown!r}.{why} It has prove, quantised and untie.")
    return owner_of(self).merge(values_of(self), **options)


METHODS = (get_nb_trainable_parameters, print_trainable_parameters, merge_and_unload)


def with_adapter_methods(net: N, owner: Owner) -> N:
    """Give a module the methods whose names are free, in place, and return it."""
    free = {method.__name__: method for method in METHODS if not hasattr(net, method.__name__)}
    cls: Any = type(net)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made: Any = type(cls.__name__, (cls,), {**names, **free})
    net.__class__ = made
    vars(net)[OWNER] = owner
    return net


def owner_of(net: object) -> Owner:
    """Return the program of a module, with the operations on it.

    Raises:
        PeftGraphError: it is no module of a program.
    """
    found = vars(net).get(OWNER) if isinstance(net, nn.Module) else None
    if not isinstance(found, Owner):
        raise PeftGraphError(f"{type(net).__name__} is no module of a program: no pg.tune and no module() made it.")
    return found


def values_of(net: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training moves, by name, as they are in the module, which may be a copy."""
    names = owner_of(net).names
    every = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    return {name: value for name, value in every.items() if name in names}
