"""The registry of roles: every field of every record is used, and nothing but the registry has to know a role."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn

import peftgraph as pg
from peftgraph.draw.html_page import KEY
from peftgraph.draw.svg import css_class, style
from peftgraph.sites.ports import (
    PORTS,
    PortKind,
    input_port,
    is_read_by_all,
    kind_of,
    named_part,
    result_port,
    stored_port,
)
from peftgraph.sites.roles import BY_NAME, GROUPS, ROLES, WORDS, Role, absent, selected_by
from peftgraph.sites.search import finder_of, finders
from tests.support.role_table import PAGE, rewritten

EACH = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


@EACH
def test_the_record_of_a_role(role: Role) -> None:
    assert re.fullmatch(r"[a-z]+(\.[a-z]+)?", role.name)
    assert role.meaning[:1].islower()
    assert not role.meaning.endswith(".")
    assert set(role.ports) <= PORTS.keys()
    assert set(role.words) <= set(WORDS)
    assert absent(role.name)
    assert [one.name for one in ROLES if one.rank == role.rank] == [role.name]
    assert [one.name for one in ROLES if one.title == role.title] == [role.name] or role.title is None
    assert role.level in (0, 1, 2)


@EACH
def test_a_role_is_found_explained_and_missed_by_the_module_that_its_record_names(role: Role) -> None:
    module = finder_of(role.name)
    assert inspect.getmodulename(str(inspect.getsourcefile(module))) == role.finder  # pyright: ignore[reportArgumentType]
    assert module in finders()
    for name in ("find", "evidence", "near_misses"):
        assert next(iter(inspect.signature(getattr(module, name)).parameters)) == "structure"


@EACH
def test_selectors_know_a_role(role: Role) -> None:
    chosen = pg.parse_selector(role.name)
    assert str(chosen) == role.name
    assert role.name in selected_by(role.name)
    for word in role.words:
        assert role.name in selected_by(word)
        assert str(pg.parse_selector(word)) == word
    if role.part and hasattr(pg, role.family):
        assert getattr(getattr(pg, role.family), role.part) == chosen
        assert role.part in dir(getattr(pg, role.family))


@EACH
def test_drawings_and_terminals_know_a_role(role: Role) -> None:
    from peftgraph.terminal.tables import colour

    assert colour(role.name) == (role.colour or "white")
    if role.fill:
        assert KEY[role.name] == f"--{role.fill}"
        assert f".figure .{css_class(role.name)} {{ --hue: var(--{role.fill}); }}" in style()
        assert f"--{role.fill}:" in style()


class Nothing(nn.Module):
    """A model without any part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


@pytest.fixture(scope="module")
def nothing() -> pg.Program:
    return pg.trace(Nothing(), torch.zeros(2, 3))


@EACH
def test_what_is_absent_says_why(role: Role, nothing: pg.Program) -> None:
    assert absent(role.name) in str(nothing.sites.explain(role.name))


def test_ports_are_a_closed_set() -> None:
    assert {one.kind for one in PORTS.values()} <= set(PortKind)
    assert {name for role in ROLES for name in role.ports} <= PORTS.keys()
    assert all(one.meaning for one in PORTS.values())


def test_ports_of_the_model_have_kinds_and_names() -> None:
    made = {
        input_port("ids"): PortKind.MODEL_INPUT,
        result_port("y"): PortKind.MODEL_OUTPUT,
        stored_port("w"): PortKind.WEIGHT,
    }
    assert {port: kind_of(port) for port in made} == made
    assert [named_part(port) for port in made] == ["ids", "y", "w"]
    assert [is_read_by_all(port) for port in (*made, "output", "input", "weight")] == [
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    assert kind_of("nowhere") is None
    assert named_part("output") is None
    assert {name: one.before_dropout_of for name, one in PORTS.items() if one.before_dropout_of} == {
        "undropped": "output",
        "embedded": "input",
    }


def test_words_are_roles_and_groups() -> None:
    assert list(WORDS) == [*BY_NAME, *(one.name for one in GROUPS)]
    assert all(selected_by(group.name) for group in GROUPS if group.name != "weight")


def test_depthwise_convolutions_are_convolutions_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, groups=2))
    program = pg.trace(model.eval(), torch.randn(2, 4, 8, 8))
    (depthwise,) = program.sites.select(pg.conv.depthwise)
    assert (depthwise.path, depthwise.role) == ("0", "conv.depthwise")
    assert [site.path for site in program.sites.select(pg.conv)] == ["0", "2"]
    assert "a depthwise convolution" in str(program.sites.explain("conv.depthwise"))
    plain = pg.trace(nn.Sequential(nn.Conv1d(4, 4, 3)).eval(), torch.randn(2, 4, 8))
    with pytest.raises(pg.NoMatch, match="a group of its own for each input channel, found a kernel of 4 x 4 x 3 in 1"):
        plain.sites.require("conv.depthwise")


def test_the_manual_has_the_tables_of_the_registry() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rewritten(page) == page, "run python tests/support/role_table.py"
