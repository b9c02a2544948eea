"""Trained parameters of the base as peft spells them: biases by the option `bias`, modules by `modules_to_save`.

peft saves all biases or those of the adapted modules, and whole modules: what did not train is written as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.written import Places, Written, modules_of, targets
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.weight_views import bias_view


def trained_values(program: ProgramData, shifted: Places) -> dict[str, Tensor]:
    """The base's parameters that passes train, by name, and biases that a pass adds a part to.

    Args:
        program: the tuned program.
        shifted: where BitFit adds to a slice of a stored bias.

    Raises:
        AdapterError: there is no bias to add to.
    """
    values = {name: entry.tensor.detach() for name, entry in program.table.items() if entry.base_tensor is not None}
    for method, site, tensors in shifted:
        view = bias_view(site)
        if view is None:
            raise AdapterError(f"{method} at {site} cannot be written for peft: it adds a bias where there is none.")
        full = values.get(view.parameter, program.table[view.parameter].tensor.detach())
        values[view.parameter] = view.put(full, view.get(full) + tensors["bitfit_d"].detach())
    return values


def write_stored(
    program: ProgramData, values: dict[str, Tensor], adapted: Collection[str], prefix: str, biases: bool
) -> Written:
    """The options and tensors of trained parameters of the base.

    Args:
        program: the tuned program.
        values: the trained ones, by name.
        adapted: the paths of the modules that are adapted beside.
        prefix: what stands before every name.
        biases: whether the method has an option for biases.

    Raises:
        AdapterError: a module is to be adapted and saved.
    """
    base = {name: entry.tensor for name, entry in program.table.items() if not entry.added and entry.persistent}
    if biases and values and all("bias" in name for name in values):
        own = {name for name in base if name.rpartition(".")[0] in adapted and name.endswith(".bias")}
        option, names = ("lora_only", own) if own.issuperset(values) else ("all", {n for n in base if "bias" in n})
        config: dict[str, Any] = {"bias": option}
    else:
        modules = {name.rpartition(".")[0] for name in values}
        both = next((one for one in modules if any(f"{path}.".startswith(f"{one}.") for path in adapted)), None)
        if both is not None:
            raise AdapterError(
                f"{both} trains and is adapted, and peft does one of them: its modules_to_save are whole."
            )
        names = {name for name in base if any(name.startswith(f"{one}.") for one in modules)}
        config = {"modules_to_save": saved_names(modules, modules_of(program))} if modules else {}
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        inside = f"{path}.base_layer.{leaf}" if path in adapted else name
        tensors[prefix + inside] = values.get(name, base[name])
    return Written(config, tensors)


def saved_names(modules: set[str], known: set[str]) -> list[str]:
    """peft saves every module whose path ends with a name, letter by letter."""
    names = targets(modules, known)
    listed = sorted(modules) if isinstance(names, str) else names
    wrong: list[str] = []
    for names in (listed, sorted(modules)):
        wrong = [path for path in known if path.endswith(tuple(names)) and path not in modules]
        if not wrong:
            return names
    raise AdapterError(f"{sorted(modules)[0]} trains; peft would save {wrong[0]} as well, as its path ends so too.")
