"""Columns, weights and the table."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peftgraph.sites import Columns, Site, Sites, Weight


def test_runs_keep_the_order_of_the_heads() -> None:
    columns = Columns.from_indices([8, 9, 10, 2, 3, 0])
    assert columns.runs == ((8, 11), (2, 4), (0, 1))
    assert columns.index().tolist() == [8, 9, 10, 2, 3, 0]
    assert not columns.contiguous
    assert columns.starts_at == 8
    assert len(columns) == 6


def test_print() -> None:
    assert str(Columns(((0, 48),))) == "0:48"
    assert str(Columns(((0, 8), (24, 32), (48, 56), (72, 80)))) == "0:8,24:32,48:56,..."


@given(st.lists(st.integers(0, 40), min_size=1, unique=True))
def test_indices_round_trip(indices: list[int]) -> None:
    assert list(Columns.from_indices(indices)) == indices


def test_weight_shape_is_out_by_in_of_the_window() -> None:
    tensors = {"w": torch.empty(5, 12), "e": torch.empty(4, 10, 6)}
    assert Weight("w").shape(tensors) == (5, 12)
    assert Weight("w", transposed=True).shape(tensors) == (12, 5)
    assert Weight("w", transposed=True, window=Columns(((0, 4),))).shape(tensors) == (4, 5)
    assert Weight("e", experts=4).shape(tensors) == (10, 6)
    assert Weight("e", experts=4, transposed=True).shape(tensors) == (6, 10)


def test_table() -> None:
    q = Site(role="attention.q", path="a.q", op="n", layer=0, kind="self", columns=Columns(((0, 4),)), shape=(4, 8))
    sites = Sites((q, Site(role="head", path="h", op="m")))
    assert str(sites) == (
        "role         path  layer  stack  kind  columns  shape\n"
        "attention.q  a.q   0             self  0:4      4 x 8\n"
        "head         h"
    )


def test_a_site_is_hashable_and_has_a_name() -> None:
    site = Site(role="ffn.up", path="x", op="n", layer=0, expert=3, port_items=(("input", "a"),))
    assert hash(site) == hash(site)
    assert site.id == "0.ffn.up[expert 3]"
    assert site.ports["input"] == "a"
