"""Reads and writes this library's own adapter directories: `adapter.json` and a safetensors file.

`adapter.json` holds the recipe, the fingerprint of the base and a checksum of both files. The safetensors file is named
after its content, so it never replaces another one. `adapter.json` names it and is written last, as the commit point:
an interrupted save leaves the old adapter or the new one. Nothing after it can fail; files that cannot be removed are
removed by the next save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from peftgraph.errors import AdapterError, PeftGraphError
from peftgraph.interop.adapter_folder import INDEX
from peftgraph.interop.checked_files import read_json, read_tensors
from peftgraph.interop.fingerprint import fingerprint, first_difference
from peftgraph.interop.packing import packed, unpacked
from peftgraph.interop.pass_values import apply_passes, check_fit, rename_passes
from peftgraph.ir.builder import starts_computed
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.method import Pass
from peftgraph.rewrite.spec import parse_pass
from peftgraph.utils.atomic_files import atomic_file, folder_lock

FORMAT = 2
TRAINER_INDEX, TRAINER_FILE = "model.safetensors.index.json", "model.safetensors"  # what the Trainer looks for
P = TypeVar("P", bound=ProgramData)


def save(program: ProgramData, directory: Path) -> Path:
    """Write the adapter of `program`.

    Raises:
        AdapterError: nothing was applied, the weights are on the meta device, or a partial fold changed the
            base.
        PeftGraphError: the directory cannot be written; an existing adapter stays unchanged.
    """
    check_can_save(program)
    names = _own_tensors(program)
    dense = {name: program.table[name].tensor.detach().cpu().contiguous() for name in names}
    tensors = packed(program, dense)
    content = safetensors.torch.save(tensors)
    file = directory / f"adapter-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    document = {
        "format": FORMAT,
        "recipe": [str(applied.method) for applied in program.history],
        "base": fingerprint(program),
        "tensors": {"file": file.name, "names": names},
    }
    document["sha256"] = checksum(document, content)
    try:
        with folder_lock(directory, f"saving to {directory}"):
            _write(directory, file, content, document)
    except OSError as error:
        raise PeftGraphError(f"{directory} cannot be written: {error.strerror or error}.") from error
    return directory


def _write(directory: Path, file: Path, content: bytes, document: dict[str, Any]) -> None:
    """Write both files; after an error the old adapter is unchanged."""
    old = _file_of(directory)
    try:
        with atomic_file(file) as temporary:
            temporary.write_bytes(content)
        with atomic_file(directory / INDEX) as temporary:
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
    except PeftGraphError:
        if file != old:
            _discard(file)
        raise
    for other in directory.glob("adapter-*.safetensors"):
        if OWN_NAME.fullmatch(other.name) and other != file:
            _discard(other)


def checksum(document: Mapping[str, Any], content: bytes) -> str:
    """Compute the value of "sha256" in `adapter.json`: the checksum of its other content and of the tensors' file."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode() + b"\n" + content).hexdigest()


def save_trained(program: ProgramData, trained: Mapping[str, Tensor], directory: Path) -> None:
    """Write the adapter of `program` with other values, so that the Trainer finds them when it resumes.

    The Trainer reads a checkpoint of one shard: an index that names the adapter's own file. Where a pass stores its
    parameters in another form (`Pass.pack`), the file holds other tensors than the module, and the Trainer gets a file
    of the module's.

    Raises:
        AdapterError: as `save`.
        PeftGraphError: as `save`.
    """
    changes = {name: replace(program.table[name], tensor=tensor) for name, tensor in trained.items()}
    changed = program.evolve(table=program.table.updated(changes))
    save(changed, directory)
    names, file = _own_tensors(changed), read_document(directory)["tensors"]["file"]
    dense = {name: changed.table[name].tensor.detach().cpu().contiguous() for name in names}
    if packed(changed, dense).keys() == dense.keys():
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        with atomic_file(directory / TRAINER_INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        if _is_copy(directory / TRAINER_FILE):  # of an earlier save of another adapter
            _discard(directory / TRAINER_FILE)
    else:
        if (directory / TRAINER_FILE).exists() and not _is_copy(directory / TRAINER_FILE):
            raise PeftGraphError(f"{directory / TRAINER_FILE} holds other weights; save the adapter in another folder.")
        with atomic_file(directory / TRAINER_FILE) as temporary:
            safetensors.torch.save_file(dense, temporary, {"format": "pt", "made by": "peftgraph"})


def _is_copy(file: Path) -> bool:
    """Tell whether a file holds the parameters of an adapter, written for the Trainer."""
    if not file.is_file():
        return False
    with safetensors.safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get("made by") == "peftgraph"


def load(program: P, apply: Callable[..., P], directory: Path, name: str | None) -> P:
    """Apply the saved passes with their parameters; `program` is unchanged whatever happens.

    Args:
        program: what the adapter is applied to.
        apply: its method that applies passes.
        directory: what `save` wrote.
        name: for the adapter's passes, instead of their saved names.

    Raises:
        AdapterError: the files are missing, damaged, or fit another base.
        Conflict: an adapter of that name was applied already.
    """
    tuned, tensors = read(program, apply, directory, name)
    with torch.no_grad():
        for new, value in tensors.items():
            tuned.table[new].tensor.copy_(value)
    return tuned


def read(program: P, apply: Callable[..., P], directory: Path, name: str | None) -> tuple[P, dict[str, Tensor]]:
    """Apply the saved passes, and return the program with their initial values, and the saved values by parameter.

    Arguments and errors as for `load`; the program may be on the meta device.
    """
    document = read_document(directory)
    tensors = _read_tensors(document, directory)
    difference = first_difference(document["base"], program)
    if difference is not None:
        raise AdapterError(f"{directory} fits another base: {difference}.")
    methods = _methods(document, directory, name)
    token = starts_computed.set(False)  # the file has all values
    try:
        tuned = apply_passes(apply, methods, directory)
    finally:
        starts_computed.reset(token)
    wanted = _own_tensors(tuned, since=len(program.history))
    saved = wanted if name is None else document["tensors"]["names"]  # a new name changes the parameters' names
    if len(saved) != len(wanted):
        raise AdapterError(f"{directory}: it names {len(saved)} parameters, its recipe makes {len(wanted)}.")
    targets = dict(zip(saved, wanted, strict=True))
    tensors = unpacked(tuned, len(program.history), tensors, targets, directory)
    check_fit(tensors, {old: tuned.table[new].tensor for old, new in targets.items()}, directory)
    drawn = {name: entry.draw().to(entry.tensor.dtype) for name, entry in tuned.table.items() if entry.draw is not None}
    own = {name for edit in tuned.edits[len(program.edits) :] for name in edit.parameters}
    values = {new: tensors[old] for old, new in targets.items()}
    return tuned, values | {name: value for name, value in drawn.items() if name in own}


def read_document(directory: Path) -> dict[str, Any]:
    """Read and check `adapter.json`.

    Raises:
        AdapterError: it is missing, unreadable or incomplete.
    """
    path = directory / INDEX
    document = read_json(path, missing=f"{directory} contains no {INDEX}, so it is no adapter directory.")
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise AdapterError(f"{path} is no adapter: it names no format.")
    if document["format"] != FORMAT:
        raise AdapterError(f"{path} has format {document['format']}; this version reads format {FORMAT}.")
    missing = next((part for part, holds in PARTS.items() if not holds(document.get(part))), None)
    if missing is not None:
        raise AdapterError(f"{path} is damaged: its {missing!r} is missing or of the wrong kind.")
    return document


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_base(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("model"), str):
        return False
    shapes = value.get("parameters")
    return isinstance(shapes, dict) and all(
        isinstance(shape, list) and all(type(size) is int for size in shape) for shape in shapes.values()
    )


def _is_tensors(value: object) -> bool:
    if not isinstance(value, dict) or not _is_strings(value.get("names")):
        return False
    return isinstance(value.get("file"), str)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# The parts of `adapter.json` and what each must look like.
PARTS: dict[str, Callable[[object], bool]] = {
    "recipe": _is_strings, "base": _is_base, "tensors": _is_tensors, "sha256": _is_text,
}  # fmt: skip
OWN_NAME = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


def _discard(file: Path) -> None:
    """Remove a tensors' file that no index names; if that fails, an unused file is left, which is harmless."""
    with contextlib.suppress(OSError):
        file.unlink()


def check_can_save(program: ProgramData) -> None:
    """Check that a program has passes with values, and that no partial fold changed its base.

    Raises:
        AdapterError: a condition does not hold.
    """
    if not program.history:
        raise AdapterError("There is nothing to save: no pass was applied to this program.")
    if program.table.device.type == "meta":
        raise AdapterError("This program was traced on the meta device; it has no parameters to save.")
    base = program.base if program.base is not None else program
    for name, entry in base.table.items():
        now = program.table[name]
        if (now.tensor if now.base_tensor is None else now.base_tensor) is not entry.tensor:
            raise AdapterError(
                f"A partial fold changed {name}, so the passes that are left fit no stored base. Save the "
                "adapter before folding."
            )


def _own_tensors(program: ProgramData, since: int = 0) -> list[str]:
    """Return what a file stores: the parameters of the passes from number `since` on, but those that are drawn from a
    seed, in the order of the edits, and the program's state, with one name for each tensor."""
    claimed = [name for edit in program.edits if edit.application >= since for name in edit.parameters]
    found = dict.fromkeys([*(name for name in claimed if program.table[name].draw is None), *program.table.state])
    return [name for name in found if program.table.tied(name)[0] == name]


def _methods(document: dict[str, Any], directory: Path, name: str | None) -> list[Pass]:
    try:
        methods = [parse_pass(spec) for spec in document["recipe"]]
    except (PeftGraphError, RecursionError) as error:
        raise AdapterError(f"{directory}: its recipe cannot be read: {error}") from None
    return rename_passes(methods, name, directory)


def _file_of(directory: Path) -> Path | None:
    """Return the tensors' file of the adapter that is in `directory` now; None where there is none."""
    try:
        return _tensors_path(read_document(directory), directory)
    except AdapterError:
        return None


def _tensors_path(document: dict[str, Any], directory: Path) -> Path:
    file = document["tensors"]["file"]
    if Path(file).name != file or not file.startswith("adapter-") or not file.endswith(".safetensors"):
        raise AdapterError(
            f"{directory}: its tensors must lie in adapter-*.safetensors beside {INDEX}, not in {file!r}."
        )
    return directory / file


def _read_tensors(document: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    path = _tensors_path(document, directory)

    def checked(content: bytes) -> None:
        if checksum(document, content) != document["sha256"]:
            raise AdapterError(f"{path} or {INDEX} beside it is damaged: their checksum is not the one that is noted.")

    return read_tensors(path, checked)
