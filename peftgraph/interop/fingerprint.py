"""Computes the fingerprint of a base, its class and its parameters' shapes, and compares it with a saved one.

The values of the weights are not part of it.
"""

from __future__ import annotations

from typing import Any

from peftgraph.ir.program import ProgramData


def fingerprint(program: ProgramData) -> dict[str, Any]:
    """Return the traced class and the shape of every parameter, as JSON."""
    base = program.base if program.base is not None else program
    shapes = {name: list(entry.tensor.shape) for name, entry in base.table.items() if entry.kind == "parameter"}
    return {"model": base.model, "parameters": shapes}


def first_difference(saved: dict[str, Any], program: ProgramData) -> str | None:
    """Describe the first difference of `program` to the base that a fingerprint names; None where there is none."""
    own = fingerprint(program)
    theirs, ours = f"the adapter's base {saved['model']}", f"this {own['model']}"
    wanted, have = saved["parameters"], own["parameters"]
    for name, shape in wanted.items():
        if name not in have:
            return f"{theirs} has a parameter {name}; {ours} has none"
        if shape != have[name]:
            return f"{name} has shape {tuple(shape)} in {theirs} and {tuple(have[name])} in {ours}"
    for name in have:
        if name not in wanted:
            return f"{ours} has a parameter {name}; {theirs} has none"
    if saved["model"] != own["model"]:
        return f"{theirs} and {ours} have the same parameters but are different classes"
    return None
