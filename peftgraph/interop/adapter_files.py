"""Adapter directories: `adapter.json` (recipe, base, checksum) and a safetensors file with the trained parameters.

The JSON is written last and names the tensors' file with its checksum: it is the commit point, so an interrupted save
leaves the old adapter or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftgraph.errors import AdapterError, PeftGraphError
from peftgraph.interop.fingerprint import fingerprint, first_difference
from peftgraph.ir.files import atomic
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import Pass, parse_pass

FORMAT = 1
P = TypeVar("P", bound=ProgramData)


def save(program: ProgramData, directory: Path) -> Path:
    """Writes the adapter of `program`.

    Raises:
        AdapterError: nothing was applied, or the weights are on the meta device.
        PeftGraphError: the disk refuses; an adapter that was there before stays whole.
    """
    if not program.history:
        raise AdapterError("There is nothing to save: no pass was applied to this program.")
    if program.table.device.type == "meta":
        raise AdapterError("This program was traced on the meta device; it has no parameters to save.")
    tensors = {name: p.detach().cpu().contiguous() for name, p in program.table.trainable.items()}
    tensors = _without_aliases(tensors, program)
    content = "".join(f"{name}{tuple(t.shape)}" for name, t in tensors.items()).encode()
    directory = Path(directory)
    scratch = directory / f"adapter-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    with atomic(scratch) as temporary:
        _write_tensors(tensors, temporary)
        checksum = _sha256(temporary)
        final = directory / f"adapter-{checksum[:12]}.safetensors"
    scratch.replace(final)
    document = {
        "format": FORMAT,
        "recipe": [str(applied.method) for applied in program.history],
        "base": fingerprint(program),
        "tensors": {"file": final.name, "sha256": checksum},
    }
    with atomic(directory / "adapter.json") as temporary:
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
    for old in directory.glob("adapter-*.safetensors"):
        if old != final:
            old.unlink()
    return directory


def load(program: P, apply: Callable[..., P], directory: Path, name: str | None) -> P:
    """The program after the saved passes with their parameters; `program` is unchanged whatever happens.

    Raises:
        AdapterError: the files are missing, damaged, or fit another base.
        Conflict: an adapter of that name is there already.
    """
    document = read_document(directory)
    difference = first_difference(document["base"], program)
    if difference is not None:
        raise AdapterError(f"{directory} fits another base: {difference}.")
    methods = _methods(document, directory)
    if name is not None:
        methods = [method.renamed(name) for method in methods]
    tensors = _read_tensors(document, directory)
    with torch.random.fork_rng(devices=[]):  # the initial values are overwritten: do not advance the user's generator
        tuned = apply(*methods)
    fresh = {key: p for key, p in tuned.table.trainable.items() if key not in program.table.trainable}
    if name is not None:
        tensors = _renamed(tensors, fresh)
    _check_fit(tensors, _without_aliases(dict(fresh), tuned), directory)
    with torch.no_grad():
        for key, value in tensors.items():
            fresh[key].copy_(value)
    return tuned


def read_document(directory: Path) -> dict[str, Any]:
    """The checked content of `adapter.json`.

    Raises:
        AdapterError: it is missing, unreadable or incomplete.
    """
    path = Path(directory) / "adapter.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{directory} holds no adapter.json, so it is no adapter directory.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise AdapterError(f"{path} is not an adapter of format {FORMAT}.")
    if not _is_complete(document):
        raise AdapterError(f"{path} is damaged: it lacks the recipe, the base or the tensors.")
    return document


def _is_complete(document: dict[str, Any]) -> bool:
    recipe, base, tensors = document.get("recipe"), document.get("base"), document.get("tensors")
    return (
        isinstance(recipe, list)
        and all(isinstance(spec, str) for spec in recipe)
        and isinstance(base, dict)
        and isinstance(base.get("parameters"), dict)
        and all(isinstance(shape, list) for shape in base["parameters"].values())
        and isinstance(base.get("model"), str)
        and isinstance(tensors, dict)
        and isinstance(tensors.get("file"), str)
        and isinstance(tensors.get("sha256"), str)
    )


def _methods(document: dict[str, Any], directory: Path) -> list[Pass]:
    try:
        return [parse_pass(spec) for spec in document["recipe"]]
    except PeftGraphError as error:
        raise AdapterError(f"{directory}: its recipe cannot be read: {error}") from None


def _read_tensors(document: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    filename = document["tensors"]["file"]
    if Path(filename).name != filename or not filename.endswith(".safetensors"):
        raise AdapterError(f"{directory}: the tensors must lie in the directory itself, not at {filename!r}.")
    path = Path(directory) / filename
    try:
        if _sha256(path) != document["tensors"]["sha256"]:
            raise AdapterError(f"{path} is damaged: its checksum is not the one that adapter.json names.")
        return load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None


def _check_fit(tensors: dict[str, Tensor], wanted: dict[str, Tensor], directory: Path) -> None:
    for key in sorted(tensors.keys() ^ wanted.keys()):
        where = "is not in the file" if key in wanted else "belongs to no parameter of the recipe"
        raise AdapterError(f"{directory}: {key} {where}.")
    for key, value in tensors.items():
        if value.shape != wanted[key].shape:
            raise AdapterError(f"{directory}: {key} has shape {tuple(value.shape)}, the recipe makes {tuple(wanted[key].shape)}.")


def _renamed(tensors: dict[str, Tensor], fresh: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The saved tensors under the names of a renamed adapter; both lists stand in the order of the edits."""
    return dict(zip(fresh, tensors.values(), strict=True)) if len(fresh) == len(tensors) else tensors


def _without_aliases(tensors: dict[str, Tensor], program: ProgramData) -> dict[str, Tensor]:
    """One name for each tensor: the first of those tied."""
    return {name: tensor for name, tensor in tensors.items() if program.table.tied(name)[0] == name}


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(None, str(error)) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


