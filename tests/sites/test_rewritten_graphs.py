"""Laws of structure on rewritten graphs: names, identities and the order of stored columns are no evidence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import peftgraph as pg
from peftgraph.ir.graphs import copy_graph
from peftgraph.sites import Site, Sites, find_sites
from tests.support import zoo

aten = torch.ops.aten
LAW = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MODELS = st.tuples(st.sampled_from(zoo.NAMES), st.sampled_from(zoo.ATTENTIONS))
CHANCE = st.randoms(use_true_random=False)


def copied(name: str, attn: str) -> tuple[fx.Graph, dict[str, torch.Tensor], Sites]:
    """A copy of a model's graph, its tensors, and its sites."""
    program = zoo.traced(name, attn)
    return copy_graph(program.graph), dict(program.table.tensors()), program.sites


def after(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Inserts target(node, *args) after `node` and hands its result to all users."""
    with graph.inserting_after(node):
        new = graph.call_function(target, (node, *args))
    values = fx.map_arg((node, *args), lambda one: one.meta["val"])
    new.meta = {**node.meta, "val": target(*values)}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def essence(sites: Iterable[Site]) -> list[tuple[object, ...]]:
    """What a site is, apart from the names of nodes."""
    kept = [
        (s.role, s.path, s.layer, s.stack, s.kind, s.columns, s.weight, s.bias, s.scale, s.heads, s.head_dim)
        for s in sites
    ]
    more = [(s.layout, s.expert, s.parallel, s.note, s.shape) for s in sites]
    return sorted(zip(kept, more, strict=True), key=repr)


# names


@LAW
@given(MODELS, CHANCE)
def test_names_are_no_evidence(model: tuple[str, str], chance: random.Random) -> None:
    """Every parameter, module and node gets a new name: the sites are the same under the new names."""
    graph, tensors, sites = copied(*model)
    shuffled = list(tensors)
    chance.shuffle(shuffled)
    new_name = dict(zip(tensors, (f"m{i}.{old}" for i, old in enumerate(shuffled)), strict=True))
    for i, node in enumerate(graph.nodes):
        node.meta = {"val": node.meta.get("val")}
        if node.op == "get_attr":
            node.target = new_name[str(node.target)]
        node.name = f"n{i}_{chance.randrange(10**6)}"
    found = find_sites(graph, {new_name[name]: tensor for name, tensor in tensors.items()})
    old_name = {new: old for old, new in new_name.items()}
    assert [shape_of(site, old_name) for site in found] == [shape_of(site, None) for site in sites]


def shape_of(site: Site, names: dict[str, str] | None) -> tuple[object, ...]:
    weight = site.weight and (
        names[site.weight.parameter] if names else site.weight.parameter,
        site.weight.transposed,
        site.weight.window,
        site.weight.experts,
    )
    bias = site.bias and (names[site.bias.parameter] if names else site.bias.parameter)
    kept = (site.role, site.layer, site.stack, site.kind, site.columns, site.heads, site.layout, site.expert)
    return (*kept, weight, bias, tuple(port for port, _ in site.port_items))


# identities

IDENTITIES: dict[str, Callable[[fx.Graph, fx.Node], object]] = {
    "dropout": lambda graph, node: after(graph, node, aten.dropout.default, 0.0, True),
    "cast": lambda graph, node: after(graph, after(graph, node, aten.to.dtype, torch.float64), aten.to.dtype, F32),
    "contiguous": lambda graph, node: after(graph, node, aten.contiguous.default),
    "alias": lambda graph, node: after(graph, node, aten.alias.default),
    "reshape": lambda graph, node: after(graph, after(graph, node, aten.unsqueeze.default, 0), aten.squeeze.dim, 0),
    "transpose": lambda graph, node: after(
        graph, after(graph, node, aten.transpose.int, 0, -1), aten.transpose.int, 0, -1
    ),
    "scale": lambda graph, node: after(graph, node, aten.mul.Scalar, 1.0),
}
F32 = torch.float32


@LAW
@given(MODELS, CHANCE, st.integers(1, 30))
def test_operations_that_do_nothing_are_no_evidence(model: tuple[str, str], chance: random.Random, count: int) -> None:
    graph, tensors, sites = copied(*model)
    values = [node for node in graph.nodes if node.op == "call_function" and _is_real(node)]
    for node in chance.sample(values, min(count, len(values))):
        IDENTITIES[chance.choice(list(IDENTITIES))](graph, node)
    graph.lint()
    assert essence(find_sites(graph, tensors)) == essence(sites)


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.dim() > 0


# columns


@LAW
@given(st.sampled_from(["gpt2", "gpt_neox", "nano"]), st.sampled_from(zoo.ATTENTIONS), CHANCE)
def test_permuted_columns_move_with_their_consumer(name: str, attn: str, chance: random.Random) -> None:
    """The features of the fused projections are stored in another order, and put back where they are read."""
    graph, tensors, sites = copied(name, attn)
    order: dict[str, torch.Tensor] = {}
    for op in dict.fromkeys(site.op for site in sites.select("attention.q")):
        node = next(one for one in graph.nodes if one.name == op)
        width = int(node.meta["val"].shape[-1])
        order[op] = torch.tensor(chance.sample(range(width), width))
        with graph.inserting_before(node):
            index = graph.get_attr(f"order_{op}")
        index.meta["val"] = node.meta["val"].new_empty(width, dtype=torch.long)
        tensors[f"order_{op}"] = order[op]
        after(graph, node, aten.index_select.default, -1, index)
    found = {site.id: site for site in find_sites(graph, tensors)}
    for site in sites.select("attention.*|ffn.*"):
        old, new = site.columns, found[site.id].columns
        if site.op not in order:
            assert old == new
            continue
        assert old is not None
        assert new is not None
        moved = [int(order[site.op][column]) for column in old]
        assert site.head_dim is not None
        assert list(new) == by_head(moved, site.head_dim)


def by_head(columns: list[int], width: int) -> list[int]:
    """The heads in their order, the columns of each in the order in which they are stored."""
    return [one for start in range(0, len(columns), width) for one in sorted(columns[start : start + width])]


# no attention


class Drawn(nn.Module):
    """A random residual network of projections, convolutions, norms, gates and pools: anything but attention."""

    def __init__(self, parts: list[str], width: int) -> None:
        super().__init__()
        self.parts = parts
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in parts)
        self.other = nn.ModuleList(nn.Linear(width, width) for _ in parts)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in parts)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in parts)
        self.cell = nn.GRU(width, width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, part in enumerate(self.parts):
            h = self.norms[i](x)
            a, b = self.body[i](h), self.other[i](h)
            x = self.part(part, i, x, h, a, b)
        return x

    def part(
        self, part: str, i: int, x: torch.Tensor, h: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        match part:
            case "ffn":
                return x + self.other[i](torch.relu(a))
            case "softmax gate":
                return x + torch.softmax(a, -1) * b
            case "pooled by softmax":
                return x + (torch.softmax(a[..., :1], 1) * b).sum(1, keepdim=True)
            case "product":
                return x + (a @ b.transpose(1, 2)) @ h
            case "softmax of a product":
                return x + torch.softmax(a @ b.transpose(1, 2), -1).sum(-1, keepdim=True) * h
            case "linear attention":
                return x + torch.relu(a) @ (torch.relu(b).transpose(1, 2) @ h)
            case "conv":
                return x + self.convs[i](h.transpose(1, 2)).transpose(1, 2)
            case "mixed":
                return x + torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real
            case "recurrent":
                return x + self.cell(h)[0]
            case _:
                return torch.tanh(a) * torch.sigmoid(b)


PARTS = ["ffn", "softmax gate", "pooled by softmax", "product", "softmax of a product", "linear attention", "conv"]
PARTS += ["mixed", "recurrent", "no residual"]


@settings(LAW, max_examples=3, derandomize=True)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3, unique=True), st.sampled_from([10, 12]))
@example(["no residual", "product"], 10)
def test_networks_without_attention_have_none(parts: list[str], width: int) -> None:
    sites = pg.trace(Drawn(parts, width), (torch.randn(3, 7, width),)).sites
    assert not [site for site in sites if site.role.startswith("attention")]
    with pytest.raises(pg.NoMatch):
        sites.require("attention.q")
