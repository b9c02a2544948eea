"""Passes at sites of one's own: applied, trained, folded with proof, saved, and written in recipes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.authoring import Pass, Rule, train_parameters
from peftgraph.passes import IA3, LoRA, SerialAdapter
from peftgraph.rewrite.recipe import to_toml

FUSED = pg.Pattern(
    "fused", "out = linear(mul(silu(~c), sigmoid(~z))); c = conv1d(~u, weight); u = linear(x); z = linear(x)"
)
RECIPE = """
[patterns]
"my.fused" = '''
    out = linear(mul(silu(~c), sigmoid(~z)))
    c = conv1d(~u, weight)
    u = linear(x)
    z = linear(x)
'''

[[pass]]
use = "lora"
at = "my.fused.z & layers(0)"
rank = 2

[[pass]]
use = "ia3"
at = "my.fused.u | my.fused.out"
"""


@pytest.mark.parametrize(
    "method",
    [
        LoRA(at=FUSED["z"], rank=2),
        LoRA(at=FUSED["u"] | FUSED["out"], rank=3),
        IA3(at=FUSED["z"]),
        pg.Pipeline([LoRA(at=FUSED["z"], rank=2), IA3(at=FUSED["u"]), LoRA(at="projection", rank=2, name="all")]),
    ],
    ids=["columns", "two", "scale", "three"],
)
def test_the_identity_at_start_training_and_a_proven_fold(fused: pg.Program, method: Pass) -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    base, tuned = fused.module(), fused.apply(method)
    net = tuned.module()
    torch.testing.assert_close(net(x), base(x), rtol=0, atol=1e-12)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss: Tensor = net(x).square().mean()
        loss.backward()
        optimizer.step()
    assert (net(x) - base(x)).abs().max() > 1e-4
    merged = pg.fold(tuned)
    assert merged.text() == fused.text()
    torch.testing.assert_close(merged.module()(x), net(x), rtol=0, atol=1e-10)


def test_only_the_columns_change(fused: pg.Program) -> None:
    tuned = fused.apply(LoRA(at=FUSED["z"] & pg.layers(0), rank=2))
    tuned.table.trainable["0.both.z.lora_B"].data.normal_()
    changed = pg.fold(tuned).table["0.both.weight"].tensor != fused.table["0.both.weight"].tensor
    assert not changed[:20].any()
    assert changed[20:].any()
    assert list(tuned.table.trainable) == ["0.both.z.lora_A", "0.both.z.lora_B"]


def test_an_adapter_after_a_value_that_is_no_projection(fused: pg.Program) -> None:
    pattern = pg.Pattern("own", "y = mul(a, b); a = silu(_); b = sigmoid(_)")
    tuned = fused.apply(SerialAdapter(at=pattern["y"], width=3))
    assert [edit.site for edit in tuned.edits] == ["0.own.y", "1.own.y"]
    with pytest.raises(pg.NoFold, match=r"0\.own\.y: serial_adapter: it is nonlinear"):
        pg.fold(tuned)
    with pytest.raises(pg.PeftGraphError, match=r"0\.own\.y at 0 has no weight: it is no projection"):
        fused.apply(LoRA(at=pattern["y"]))


def test_a_hand_written_norm_trains_in_place(gated_norm: pg.Program) -> None:
    pattern = pg.Pattern("own", "y = linear(n); n = norm(x)")

    class TrainGain(Pass):
        def rules(self) -> list[Rule]:
            return [train_parameters(pattern["n"])]

    tuned = gated_norm.apply(TrainGain())
    assert set(tuned.table.trainable) == {"gain"}


@pytest.fixture
def gated_norm(trace: Callable[..., pg.Program]) -> pg.Program:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.w = nn.Parameter(torch.rand(12)), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain)

    return trace(Normed())


# sites


def test_patterns_leave_the_other_sites_alone(fused: pg.Program) -> None:
    more = fused.with_patterns(FUSED)
    roles = {f"fused.{part}" for part in FUSED}
    assert tuple(site for site in more.sites if site.role not in roles) == tuple(fused.sites)
    assert more.text() == fused.text()
    assert more.with_patterns(FUSED["z"]) is more
    tuned = fused.apply(LoRA(at=FUSED["z"], rank=2))
    assert tuned.sites.searched == more.sites.searched
    assert tuned.remove().text() == fused.text()


def test_sites_that_were_not_searched_say_so(fused: pg.Program) -> None:
    for ask in (fused.sites.select, fused.sites.require):
        with pytest.raises(pg.PeftGraphError, match=r"not searched for the pattern fused.*with_patterns"):
            ask(FUSED["z"])


def test_two_patterns_of_one_name_conflict(fused: pg.Program) -> None:
    other = pg.Pattern("fused", "z = linear(x)")
    with pytest.raises(pg.Conflict, match="Two patterns are called 'fused'"):
        fused.apply(LoRA(at=FUSED["z"]), LoRA(at=other["z"], name="again"))


def test_an_alternative_that_is_never_taken_is_no_site(gated: pg.Program) -> None:
    pattern = pg.Pattern("own", "y = linear(a|b); a = mul(_, _); b = tanh(_)")
    with pytest.raises(pg.NoMatch, match="matches 2 times, but never by an alternative with b"):
        gated.apply(SerialAdapter(at=pattern["b"]))


# recipes and files


def test_a_recipe_defines_its_own_sites(fused: pg.Program, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    method = pg.load_recipe(path)
    assert pg.parse_pass(str(method)) == method
    tuned = fused.apply(method)
    assert [edit.site for edit in tuned.edits] == [
        "0.my.fused.z",
        "0.my.fused.u",
        "0.my.fused.out",
        "1.my.fused.u",
        "1.my.fused.out",
    ]
    again = tmp_path / "again.toml"
    again.write_text(to_toml(method))
    assert 'at = "my.fused.u|my.fused.out"' in again.read_text()
    assert pg.load_recipe(again) == method


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('patterns = "x"\n[[pass]]\nuse = "lora"\n', r"\[patterns\] holds lines such as"),
        (
            '[patterns]\nown = "y = liner(x)"\n[[pass]]\nuse = "lora"\n',
            r"\[patterns\] own: there is no operator 'liner'",
        ),
        ('[patterns]\nown = "y = linear(x)"\n[[pass]]\nuse = "lora"\n', "the pattern 'own' is used by no pass"),
        (
            '[patterns]\nown = "y = linear(x)"\n[[pass]]\nuse = "lora"\nat = "own.z"\n',
            "own.z is no value of the pattern",
        ),
        ('[patterns]\nffn = "y = linear(x)"\n[[pass]]\nuse = "lora"\nat = "ffn.y"\n', "ffn has a meaning in selectors"),
    ],
)
def test_bad_patterns_name_file_and_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(pg.RecipeError, match=words) as error:
        pg.load_recipe(path)
    assert "bad.toml" in str(error.value)


FRESH = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import peftgraph as pg
from conftest import Fused
torch.manual_seed(0)
program = pg.trace(torch.nn.Sequential(Fused(), Fused()), (torch.randn(3, 7, 12),))
tuned = program.load_adapter(sys.argv[2])
print(sorted(site.id for site in tuned.sites if site.role.startswith("my.fused")))
print(float(tuned.table.trainable["0.both.z.lora_B"].sum()))
"""


def test_an_adapter_carries_its_patterns(fused: pg.Program, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    tuned = fused.apply(pg.load_recipe(tmp_path / "recipe.toml"))
    tuned.table.trainable["0.both.z.lora_B"].data.fill_(0.5)
    tuned.save_adapter(tmp_path / "adapter")
    here = str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", FRESH, here, str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names, total = done.stdout.splitlines()
    assert "'0.my.fused.z'" in names
    assert float(total) == 20.0
