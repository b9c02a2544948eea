"""The models of the zoo as parameters, and the row of each."""

from __future__ import annotations

import pytest

from .catalogue import entries
from .entry import Entry
from .measure import measure
from .score import Row
from .summary import PROPERTY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        groups, share = metafunc.module.GROUPS, getattr(metafunc.module, "SHARE", slice(None))
        found = [entry for entry in entries(metafunc.config.getoption("--zoo-all")) if entry.group in groups]
        chosen = found[share]  # of a group that is too long for one file
        metafunc.parametrize("entry", chosen, ids=[entry.name for entry in chosen])


@pytest.fixture
def row(entry: Entry, request: pytest.FixtureRequest) -> Row:
    """The measured row of a model, which also goes into the report."""
    found = measure(entry)
    request.node.user_properties.append((PROPERTY, found.plain()))
    return found
