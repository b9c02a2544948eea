"""One model of the zoo from building to its row of the report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import peftgraph as pg
from peftgraph.errors import PeftGraphError
from peftgraph.sites import find_sites

from .entry import Entry
from .score import Row, Score, ties_of

SAME = 1e-5  # of the largest value: what rounding in another order may move


def measure(entry: Entry) -> Row:
    """Builds, traces and scores one model. A refusal of the tracer is part of the row; other errors are raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models of every age
        model = entry.build()
        example = entry.example(model)
        try:
            program = pg.trace(model, example, fixed=sides(example))
        except PeftGraphError as error:
            return Row(entry.name, entry.group, str(error))
        return scored(entry, model, example, program)


def sides(example: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The axes of pictures and videos that keep their sizes: most models of them take one size alone."""
    tensors = {key: value for key, value in example.items() if isinstance(value, torch.Tensor)}
    return {key: tuple(range(2, value.dim())) for key, value in tensors.items() if value.dim() > 3}


def scored(entry: Entry, model: nn.Module, example: Mapping[str, Any], program: pg.Program) -> Row:
    """The row of a model that is traced."""
    row = Row(entry.name, entry.group)
    truth = entry.truth(model, example)
    start = time.perf_counter()
    sites = find_sites(program.graph, program.table.tensors())
    row.seconds = time.perf_counter() - start
    difference = differing(model.eval(), program.module().eval(), example)
    if not row.outputs.add(not difference):
        row.misses.append(f"outputs: {difference}")
    return Score(row, program, sites, truth, ties_of(model)).fill()


def differing(model: nn.Module, module: nn.Module, example: Mapping[str, Any]) -> str:
    """How what a traced program gives differs from what its model gives; "" where it does not."""
    theirs, ours = (_answer(net, example) for net in (model, module))
    if [(one.shape, one.dtype) for one in theirs] != [(one.shape, one.dtype) for one in ours]:
        return "other shapes or types"
    for a, b in zip(theirs, ours, strict=True):
        largest = a.abs().nan_to_num(0, 0, 0).max() if a.numel() else torch.zeros(())
        if not torch.allclose(b, a, SAME, float(SAME * largest), equal_nan=True):
            return f"another value, by {float((b - a).abs().max() / largest):.2g} of the largest"
    return ""


def _answer(net: nn.Module, example: Mapping[str, Any]) -> list[torch.Tensor]:
    """What a call gives, in float64, with complex numbers as pairs."""
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = pytree.tree_leaves(net(**example))
    found = [one for one in leaves if isinstance(one, torch.Tensor)]
    return [(torch.view_as_real(one) if one.is_complex() else one).to(torch.float64) for one in found]
