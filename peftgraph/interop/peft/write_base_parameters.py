"""Writes trained parameters of the base for peft: biases by the option `bias`, modules by `modules_to_save`.

peft saves all biases or those of the adapted modules, and whole modules: tensors of them that did not train are written
as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from peftgraph.errors import AdapterError
from peftgraph.interop.parameter_names import BIAS_SHIFT
from peftgraph.interop.peft.adapter_content import AdaptedSite, PeftContent, module_paths, target_names
from peftgraph.ir.program import ProgramData
from peftgraph.passes import BitFit
from peftgraph.rewrite.weight_views import bias_view


def trained_values(program: ProgramData, shifted: Sequence[AdaptedSite[BitFit]]) -> dict[str, Tensor]:
    """Return the base's parameters that passes train, by name, and biases that a pass adds to.

    Args:
        program: the tuned program.
        shifted: the sites where BitFit adds to a part of a stored bias.

    Raises:
        AdapterError: there is no bias to add to.
    """
    own = {name: entry for name, entry in program.table.items() if entry.base_tensor is not None}
    values = {name: entry.tensor.detach() for name, entry in own.items() if entry.quantised is None}
    for one in shifted:
        view = bias_view(one.site)
        if view is None:
            raise AdapterError(
                f"{one.method} at {one.site} cannot be written for peft: it adds a bias where there is none."
            )
        full = values.get(view.parameter, program.table[view.parameter].tensor.detach())
        values[view.parameter] = view.put(full, view.get(full) + one.parameters[BIAS_SHIFT].detach())
    return values


def write_base_parameters(
    program: ProgramData, values: dict[str, Tensor], adapted: Collection[str], prefix: str, biases: bool
) -> PeftContent:
    """Return the options and tensors of trained parameters of the base.

    Args:
        program: the tuned program.
        values: the trained parameters, by name.
        adapted: the paths of the modules that are adapted.
        prefix: of every name in the file.
        biases: whether the method has an option for biases.

    Raises:
        AdapterError: a module is adapted and trains as a whole.
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
        config = {"modules_to_save": saved_names(modules, module_paths(program))} if modules else {}
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        inside = f"{path}.base_layer.{leaf}" if path in adapted else name
        tensors[prefix + inside] = values.get(name, base[name])
    return PeftContent(config, tensors)


def saved_names(modules: set[str], known: set[str]) -> list[str]:
    """Return names for `modules_to_save`, by which peft saves every module whose path ends with one, as text.

    Raises:
        AdapterError: the names would also save another module.
    """
    names = target_names(modules, known)
    listed = sorted(modules) if isinstance(names, str) else names
    wrong: list[str] = []
    for names in (listed, sorted(modules)):
        wrong = [path for path in known if path.endswith(tuple(names)) and path not in modules]
        if not wrong:
            return names
    raise AdapterError(f"{sorted(modules)[0]} trains; peft would save {wrong[0]} as well, as its path ends so too.")
