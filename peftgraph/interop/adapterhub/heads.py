"""Reads the prediction head beside an adapter of the `adapters` library, as parameters of the base that train.

From a model with transformers' own head, the library saves that head under its own names. The heads of the library's
own model classes are modules that transformers does not have, and are not read.
Source: adapter-hub/adapters 1.3, loading.py (PredictionHeadLoader).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peftgraph.interop.adapterhub.saved_adapter import SavedAdapter
from peftgraph.interop.base_parameters import equals_or_unknown, parameters_of, sites_owning_only
from peftgraph.interop.checked_files import read_object, read_tensors
from peftgraph.interop.site_selection import selector_for
from peftgraph.ir.program import ProgramData
from peftgraph.passes import Train
from peftgraph.rewrite.method import ParameterKey, PassWithValues
from peftgraph.sites import Sites

HEAD = "head_config.json"
TENSORS = "model_head.safetensors"


def head_passes(program: ProgramData, sites: Sites, saved: SavedAdapter) -> tuple[list[PassWithValues], str]:
    """Return the pass that trains the head (none if it equals the base's), and a warning if the head is not read.

    Raises:
        AdapterError: a file is damaged.
    """
    if not (saved.directory / HEAD).exists():
        return [], ""
    document = read_object(saved.directory / HEAD, missing="")
    tensors = read_tensors(saved.directory / TENSORS) if (saved.directory / TENSORS).exists() else {}
    own = {name: program.table[name].tensor for name in tensors if name in program.table}
    alike = bool(tensors) and all(name in own and own[name].shape == value.shape for name, value in tensors.items())
    if document.get("config") is not None or not alike:
        why = "a program has the heads of the model that was traced. Copy its weights into that one if you want them"
        return [], _unread(saved, why)
    return _trained(
        program,
        sites,
        saved,
        {name: value for name, value in tensors.items() if not equals_or_unknown(own[name], value)},
    )


def _trained(
    program: ProgramData, sites: Sites, saved: SavedAdapter, wanted: Mapping[str, Tensor]
) -> tuple[list[PassWithValues], str]:
    chosen = sites_owning_only(sites, set(wanted))
    lost = sorted(set(wanted) - {name for site in chosen for name in parameters_of(site)})
    tied = next((other for name in wanted for other in program.table.tied(name) if other not in wanted), None)
    if tied is not None:
        why = f"it is tied to {tied} here. Trace a model whose configuration has tie_word_embeddings=False"
        return [], _unread(saved, why)
    if lost:
        return [], _unread(saved, f"{lost[0]} is no site's own here. Copy its weights into the model that is traced")
    if not chosen:
        return [], ""
    values: dict[ParameterKey, Tensor] = {**wanted}
    return [PassWithValues(Train(at=selector_for(sites, chosen)), values)], ""


def _unread(saved: SavedAdapter, why: str) -> str:
    return f"{saved.directory} holds a prediction head beside the adapter ({HEAD}), which is not read: {why}."
