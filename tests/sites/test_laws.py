"""Laws: names are no evidence, and the attention implementation is none either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from peftgraph.sites import Site, Sites

Find = Callable[..., Sites]
BOTH = [
    "BertModel",
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "ViTForImageClassification",
    "MixtralForCausalLM",
]


def essence(site: Site) -> tuple[object, ...]:
    return (site.role, site.path, site.layer, site.stack, site.kind, site.columns, site.weight, site.layout)


@pytest.mark.parametrize("name", BOTH)
def test_eager_and_sdpa_have_the_same_sites(sites_of: Find, name: str) -> None:
    eager, fused = sites_of(name, "eager"), sites_of(name, "sdpa")
    assert Counter(map(essence, eager)) == Counter(map(essence, fused))


class Block(nn.Module):
    """A pre-norm block whose submodules have the names it is given."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        parts = (nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12))
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, qkv, out, up, down = (getattr(self, name) for name in self.names)
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in qkv(norm(x)).split(12, dim=-1))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1) @ v
        x = x + out(mixed.transpose(1, 2).flatten(2))
        return x + down(torch.relu(up(norm(x))))


NAMES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "mlp",
    "query",
    "lm_head",
    "down_proj",
    "gate",
    "a",
    "b",
    "c",
]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(NAMES))
def test_renaming_modules_changes_no_site(find: Find, names: list[str]) -> None:
    plain = find(nn.Sequential(Block(["n", "a", "o", "u", "d"]), Block(["n", "a", "o", "u", "d"])), one_input())
    other = find(nn.Sequential(Block(names[:5]), Block(names[5:10])), one_input())
    unnamed = [(s.role, s.layer, s.kind, s.columns, s.heads, s.op, s.port_items, s.shape) for s in plain]
    assert [(s.role, s.layer, s.kind, s.columns, s.heads, s.op, s.port_items, s.shape) for s in other] == unnamed
    assert Counter(site.role for site in plain)["attention.q"] == 2


def one_input() -> tuple[torch.Tensor]:
    return (torch.randn(3, 7, 12),)
