"""Programs of earlier traces, in a folder: one file each, found by everything that the trace depends on.

A file holds the graph as JSON and the constants of the model's code, in the format safetensors; the model's own tensors
are not in it. Files appear whole or not at all, so several processes may use one folder. A file that cannot be read, or
that was made of sources which have changed since, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.utils import _pytree as pytree

from peftgraph.capture.example_inputs import Example
from peftgraph.capture.model_identity import file_digest, loaded_sources
from peftgraph.capture.stored_graph import NotStorable, dump_graph, load_graph
from peftgraph.errors import PeftGraphError
from peftgraph.ir.comparison_report import ComparisonReport
from peftgraph.ir.program import ProgramData
from peftgraph.ir.signature import InputSpec, Signature, SizeCondition
from peftgraph.ir.tensor_table import TensorEntry, TensorTable
from peftgraph.utils.atomic_files import atomic_file
from peftgraph.utils.cache_folder import make_room

DOCUMENT = "program"  # the key of the JSON in the file's metadata


@dataclass(frozen=True)
class FoundTrace:
    """What a file holds.

    Attributes:
        distinct: whether the batch was changed for the trace, so that it equals no other size.
        document: the program, apart from the model's tensors.
        constants: the tensors of the model's code.
    """

    distinct: bool
    document: Mapping[str, Any]
    constants: Mapping[str, torch.Tensor]

    def program(self, model: nn.Module, bound: Example, table: TensorTable) -> ProgramData:
        """Return the program of a model that is the one that was traced, as far as a trace depends on it.

        Args:
            model: the model.
            bound: the call, with the batch of the trace.
            table: the model's tensors.
        """
        document = self.document
        entries = {name: TensorEntry(one, "constant", persistent=False) for name, one in self.constants.items()}
        table = table.updated({name: entries[name] for name in document["constants"]})
        classes = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in map(type, model.modules())}
        return ProgramData(
            model=type(model).__name__,
            graph=load_graph(document["graph"], table, bound.tensors, classes),
            table=table,
            signature=_load_signature(document["signature"], bound),
            example=bound.tensors,
            can_change_dtype=document["can_change_dtype"],
            comparison=_load_report(document["comparison"]),
        )


def find_trace(folder: Path, key: str) -> FoundTrace | None:
    """Return the trace of a key; None where there is none that is whole and up to date."""
    path = folder / f"{key}.trace"
    try:
        content = path.read_bytes()
        digest, _, payload = content.partition(b"\n")
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            return None
        length = int.from_bytes(payload[:8], "little")
        document = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"][DOCUMENT])
        if any(file_digest(file) != known for file, known in document["files"].items()):
            return None
        found = FoundTrace(document["distinct"], document, safetensors.torch.load(payload))
        os.utime(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
        return None
    return found


def store_trace(folder: Path, key: str, program: ProgramData, distinct: bool) -> str:
    """Store a program under a key; return why not, "" where it was stored."""
    constants = {name: entry.tensor for name, entry in program.table.items() if entry.kind == "constant"}
    try:
        document = {
            "graph": dump_graph(program.graph),
            "signature": _dump_signature(program.signature),
            "can_change_dtype": program.can_change_dtype,
            "comparison": _dump_report(program.comparison),
            "constants": list(constants),
            "distinct": distinct,
            "files": loaded_sources(),
        }
        plain = {name: tensor.detach().clone().contiguous() for name, tensor in constants.items()}
        payload = safetensors.torch.save(plain, {DOCUMENT: json.dumps(document)})
    except (NotStorable, KeyError, ValueError, NotImplementedError) as reason:
        return str(reason) or type(reason).__name__
    digest = hashlib.sha256(payload).hexdigest().encode()
    try:
        with atomic_file(folder / f"{key}.trace") as temporary:
            temporary.write_bytes(digest + b"\n" + payload)
        make_room(folder)
    except (PeftGraphError, OSError) as error:  # a full or read-only disk costs the next trace its time, and no more
        return str(error)
    return ""


def _dump_signature(signature: Signature) -> dict[str, Any]:
    if signature.assumptions or signature.kv_cache is not None:
        raise NotStorable("assumed branches" if signature.assumptions else "cached keys and values")
    return {
        "inputs": [
            [one.name, one.key, one.argument, list(one.dims), one.optional, one.default, sorted(one.fixed.items())]
            for one in signature.inputs
        ],
        "ranges": {name: list(span) for name, span in signature.ranges.items()},
        "outputs": pytree.treespec_dumps(signature.outputs),
        "output_keys": list(signature.output_keys),
        "conditions": [[one.code, list(one.sizes), one.location, list(one.offsets)] for one in signature.conditions],
    }


def _load_signature(stored: Mapping[str, Any], bound: Example) -> Signature:
    leaves = [leaf for leaf in bound.leaves if isinstance(leaf.value, torch.Tensor)]
    inputs = tuple(
        InputSpec(name, key, argument, leaf.value.dtype, tuple(dims), optional, default, dict(fixed))
        for (name, key, argument, dims, optional, default, fixed), leaf in zip(stored["inputs"], leaves, strict=True)
    )
    return Signature(
        bound.forward,
        inputs,
        {leaf.key: leaf.value for leaf in bound.leaves if not isinstance(leaf.value, torch.Tensor)},
        {name: (low, high) for name, (low, high) in stored["ranges"].items()},
        pytree.treespec_loads(stored["outputs"]),
        tuple(stored["output_keys"]),
        bound.assumed,
        conditions=tuple(
            SizeCondition(code, tuple(sizes), location, tuple(offsets))
            for code, sizes, location, offsets in stored["conditions"]
        ),
    )


def _dump_report(report: ComparisonReport | None) -> list[Any] | None:
    return None if report is None else [list(report.runs), report.values, list(report.skipped)]


def _load_report(stored: list[Any] | None) -> ComparisonReport | None:
    return None if stored is None else ComparisonReport(tuple(stored[0]), stored[1], tuple(stored[2]))
