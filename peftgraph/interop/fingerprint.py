"""The fingerprint of a base: its class, its stored tensors' shapes, and its sites. Weights' values are no part of it."""

from __future__ import annotations

import hashlib
from typing import Any

from peftgraph.ir.program import ProgramData
from peftgraph.ir.text import print_program


def fingerprint(program: ProgramData) -> dict[str, Any]:
    """What an adapter fits, as JSON: the class, every parameter's shape, and the hash of the graph's text."""
    base = program.base if program.base is not None else program
    shapes = {name: list(entry.tensor.shape) for name, entry in base.table.items() if entry.kind == "parameter"}
    text = print_program(base).encode()
    return {"model": base.model, "parameters": shapes, "text": hashlib.sha256(text).hexdigest()}


def first_difference(saved: dict[str, Any], program: ProgramData) -> str | None:
    """The first way in which `program` is not the base that a fingerprint names; None when it is."""
    own = fingerprint(program)
    wanted, have = saved["parameters"], own["parameters"]
    for name, shape in wanted.items():
        if name not in have:
            return f"the adapter's base {saved['model']} has a parameter {name}; this {own['model']} has none"
        if list(shape) != have[name]:
            return f"{name} has shape {tuple(shape)} in the adapter's base and {tuple(have[name])} here"
    extra = next((name for name in have if name not in wanted), None)
    if extra is not None:
        return f"this {own['model']} has a parameter {extra}; the adapter's base {saved['model']} has none"
    return None
