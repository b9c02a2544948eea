"""Models of other packages: the program is the model, every weight is adapted, and what folds is what was trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import peftgraph as pg
from peftgraph.passes import IA3, LoRA, Prefix, SerialAdapter

from .entry import Entry
from .known import complaints
from .measure import differing, scored
from .packages import ENTRIES
from .summary import PROPERTY

GROUPS = ("package",)
FEW = 20  # as many packages as the extra `zoo` brings, at least


def test_the_packages_are_there() -> None:
    assert len(ENTRIES) >= FEW


def test_a_model_of_a_package(entry: Entry, request: pytest.FixtureRequest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models of every age
        model = entry.build()
        example = entry.example(model)
        program = pg.trace(model, example)
        row = scored(entry, model, example, program)
        request.node.user_properties.append((PROPERTY, row.plain()))
        assert not complaints(row)
        _check(program, program.apply(LoRA(at="weight", rank=2)), example)
        for method in (IA3(at="linear"), SerialAdapter(width=2), Prefix(length=2, hidden=None)):
            try:
                tuned = program.apply(method)
            except pg.PeftGraphError:  # in words; whatever else is raised fails
                continue
            _check(program, tuned, example)


def _check(base: pg.Program, tuned: pg.Program, example: Mapping[str, Any]) -> None:
    """What is trained gives something else than the base, and what folds gives what was trained."""
    with torch.no_grad():
        for value in tuned.table.trainable.values():
            value.add_(0.05 * torch.randn_like(value))
    net = tuned.module().eval()
    assert differing(base.module().eval(), net, example)
    merged = pg.fold(tuned, partial=True).module().eval()
    assert not differing(net, merged, example)
