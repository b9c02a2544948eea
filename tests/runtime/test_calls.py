"""A lowered module takes the model's own calls, and says what it cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import peftgraph as pg


@pytest.fixture(scope="module")
def with_labels() -> pg.Program:
    inputs = zoo.example("llama")
    return pg.trace(zoo.build("llama"), {**inputs, "labels": inputs["input_ids"]})


def test_positional_and_keyword_calls() -> None:
    net, inputs = zoo.traced("bert").module().eval(), zoo.example("bert")
    by_keyword = net(**inputs)
    by_position = net(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(by_keyword.last_hidden_state, by_position.last_hidden_state)
    assert type(by_keyword) is type(zoo.build("bert")(**inputs))
    assert by_keyword[0] is by_keyword.last_hidden_state


def test_labels_are_optional(with_labels: pg.Program) -> None:
    model, net, inputs = zoo.build("llama"), with_labels.module().eval(), zoo.example("llama", 2, 4)
    with torch.no_grad():
        expected = model(**inputs, labels=inputs["input_ids"])
    given, left_out = net(**inputs, labels=inputs["input_ids"]), net(**inputs)
    assert torch.equal(given.loss, expected.loss)
    assert torch.equal(left_out.logits, expected.logits)
    assert left_out.loss is None
    assert "loss" not in left_out
    assert torch.equal(net(**inputs, labels=None).logits, expected.logits)


def test_a_dict_leaves_out_what_depends_on_a_missing_input() -> None:
    inputs = zoo.example("nano")
    program = pg.trace(zoo.build("nano"), {**inputs, "targets": inputs["idx"]})
    net = program.module().eval()
    assert list(net(**inputs, targets=inputs["idx"])) == ["loss", "logits"]
    assert list(net(**inputs)) == ["logits"]
    assert "cross_entropy" not in str(net._peftgraph.graph_for(training=False, missing=frozenset({"targets"}))[0])


def test_nested_outputs_leave_out_too() -> None:
    class Nested(nn.Linear):
        def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
            out: dict[str, Any] = {"pair": (super().forward(x), x)}
            return out if y is None else {"extra": [y + 1, y + 2], **out}

    net = pg.trace(Nested(6, 5), (torch.ones(3, 6), torch.ones(3, 6))).module()
    assert list(net(torch.ones(2, 6))) == ["pair"]
    assert list(net(torch.ones(2, 6), torch.ones(2, 6))) == ["extra", "pair"]


def test_labels_that_were_not_traced() -> None:
    inputs = zoo.example("nano")
    with pytest.raises(
        pg.CallError,
        match="cannot take the tensor targets: it was traced without it. Trace the model again with targets",
    ):
        zoo.traced("nano").module()(**inputs, targets=inputs["idx"])


def test_inputs_that_everything_needs() -> None:
    net, inputs = zoo.traced("bert").module(), zoo.example("bert")
    with pytest.raises(pg.CallError, match="Missing input attention_mask, input_ids: .*every output depends on it"):
        net()
    with pytest.raises(pg.CallError, match="Missing input attention_mask"):
        net(inputs["input_ids"])
    with pytest.raises(pg.CallError, match="Missing input 'idx': this program takes idx: i64"):
        pg.trace(zoo.build("nano"), zoo.example("nano")).module()(idx=None)


IDS = torch.ones(2, 5, dtype=torch.long)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"idx": IDS, "inputs": IDS}, r"unexpected keyword argument 'inputs'.*The model's signature is forward\("),
    ({"idx": IDS.float()}, r"idx has dtype torch.float32; .*traced with torch.int64. Pass idx.to\(torch.int64\)"),
    ({"idx": IDS[0]}, r"idx has 1 dimensions \(5,\); this program takes i64\[B, S\]"),
    ({"idx": [[1, 2]]}, r"idx must be a tensor|cannot take idx"),
    ({"idx": IDS[:0]}, "idx has size 0 in dimension 0; the model takes at least 1"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=["unknown", "dtype", "rank", "list", "empty"])
def test_calls_that_do_not_fit(call: dict[str, Any], words: str) -> None:
    net = zoo.traced("nano").module()
    with pytest.raises(pg.CallError, match=words):
        net(**call)
    assert isinstance(pg.CallError(""), TypeError)


def test_integers_of_another_width_are_the_same_kind() -> None:
    net, inputs = zoo.traced("nano").module().eval(), zoo.example("nano")
    assert torch.equal(net(idx=inputs["idx"].int())["logits"], net(**inputs)["logits"])


def test_sizes_that_belong_together() -> None:
    net, inputs = zoo.traced("bert").module(), zoo.example("bert")
    with pytest.raises(
        pg.CallError, match="attention_mask has size 6 in dimension 1, input_ids has 7; .*must be equal"
    ):
        net(inputs["input_ids"], inputs["attention_mask"][:, :6])


def test_sizes_that_the_code_fixes() -> None:
    net = zoo.traced("vit").module()
    with pytest.raises(pg.CallError, match="pixel_values has size 1 in dimension 1; .*fixes it to 3"):
        net(torch.zeros(2, 1, 24, 24))


def test_a_length_beyond_the_position_table() -> None:
    limit = 64
    net = zoo.traced("bert").module().eval()
    inputs = zoo.example("bert", 1, limit)
    assert net(**inputs).last_hidden_state.shape[1] == limit
    with pytest.raises(pg.CallError, match="input_ids has size 65 in dimension 1; the model takes at most 64"):
        net(**zoo.example("bert", 1, limit + 1))


def test_constants_must_be_the_traced_ones() -> None:
    class Options(nn.Linear):
        def forward(self, x: Tensor, times: int = 2, mode: str = "sum", flag: bool | None = None) -> Tensor:
            return super().forward(x) * times

    x = torch.ones(2, 6)
    net = pg.trace(Options(6, 5), {"x": x, "times": 3}).module()
    assert net(x, 3).shape == (2, 5)
    assert net(x, 3, "sum", None).shape == (2, 5)
    with pytest.raises(pg.CallError, match="traced with times=3, and the model's default is 2. Pass times=3"):
        net(x)
    with pytest.raises(pg.CallError, match="cannot take times=2: it was traced with times=3"):
        net(x, times=2)
    with pytest.raises(pg.CallError, match=r"cannot take times=3.0: it was traced with times=3"):
        net(x, times=3.0)
    with pytest.raises(pg.CallError, match="cannot take mode='max': it was traced without it"):
        net(x, 3, mode="max")
    with pytest.raises(pg.CallError, match="cannot take flag=True"):
        net(x, 3, flag=True)


def test_use_cache_is_assumed_off() -> None:
    net, inputs = zoo.traced("llama").module().eval(), zoo.example("llama")
    assert torch.equal(net(**inputs, use_cache=False).logits, net(**inputs).logits)
    with pytest.raises(pg.CallError, match="cannot take use_cache=True: it was traced with use_cache=False"):
        net(**inputs, use_cache=True)
