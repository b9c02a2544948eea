"""What a model is made of: layers that look alike are one group, and each norm has its place."""

from __future__ import annotations

import doctest

import pytest
import zoo
from stacked import blocks, convolutions, outlined

from peftgraph.draw import component_variants, outline
from peftgraph.draw.model_outline import Component, Sublayer
from peftgraph.sites.explanations.listing import ranges


def slots(one: Sublayer) -> list[str]:
    return [f"{part.role}:{part.slot}" if part.role == "norm" else part.role for part in one.components]


ATTENTION = ["attention.q", "attention.k", "attention.v", "attention.o"]
EXPECTED = {
    "bert": [[*ATTENTION, "norm:post"], ["ffn.up", "ffn.down", "norm:post"]],
    "llama": [["norm:pre", *ATTENTION], ["norm:pre", "ffn.gate", "ffn.up", "ffn.down"]],
    "gpt_neox": [["norm:pre", *ATTENTION], ["norm:pre", "ffn.up", "ffn.down"]],
    "nano": [["norm:pre", *ATTENTION], ["norm:pre", "ffn.up", "ffn.down"]],
    "mixtral": [["norm:pre", *ATTENTION], ["norm:pre", "router", "ffn.gate", "ffn.up", "ffn.down"]],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_two_layers_that_look_alike_are_one_group_with_every_norm_in_its_place(name: str) -> None:
    (stack,) = outlined(name).stacks
    (group,) = stack.groups
    assert group.layers == (0, 1)
    assert [slots(one) for one in group.block.sublayers] == EXPECTED[name]
    assert all(len(part.ids) == 2 for part in group.block.components)
    assert [one.parallel for one in group.block.sublayers] == [name == "gpt_neox"] * 2


def test_an_encoder_and_its_decoder_stand_apart_and_the_decoder_reads_the_encoder() -> None:
    found = outlined("t5")
    encoder, decoder = found.stacks
    assert (encoder.name, decoder.name, found.reads) == ("encoder", "decoder", (("decoder", "encoder"),))
    assert [part.role for part in encoder.stem + encoder.tail] == ["embedding", "norm"]
    assert [part.role for part in decoder.stem + decoder.tail] == ["embedding", "norm", "head"]
    (group,) = decoder.groups
    assert [(one.role, one.kind) for one in group.block.sublayers] == [
        ("attention", "self"),
        ("attention", "cross"),
        ("ffn", ""),
    ]
    assert all(part.cross for part in group.block.sublayers[1].of("attention.k", "attention.v"))


def test_a_fused_weight_says_with_whom_and_which_columns() -> None:
    (group,) = outlined("gpt2").stacks[0].groups
    q, k, v, _ = group.block.sublayers[0].components[1:]
    assert (q.columns, k.columns, v.columns) == ("0:48", "48:96", "96:144")
    assert k.fused == ("attention.q", "attention.v")
    assert q.values == 48 * 48 + 48
    assert q.stored == "in x out"


def test_tied_weights_and_experts_are_said() -> None:
    tied = outlined("llama")
    assert tied.stacks[0].stem[0].tied == ("head",)
    assert tied.stacks[0].tail[-1].tied == ("embedding",)
    assert outlined("mixtral").stacks[0].tail[-1].tied == ()
    gate = outlined("mixtral").stacks[0].groups[0].block.sublayers[1].of("ffn.gate")[0]
    assert (gate.experts, gate.shape, gate.values) == (4, (80, 48), 4 * 80 * 48)


def test_layers_that_take_turns_in_their_masks_are_two_groups() -> None:
    (stack,) = blocks([32] * 4, [5, None, 5, None]).stacks
    assert [(group.layers, group.block.sublayers[0].mask) for group in stack.groups] == [
        ((0, 2), "window 5"),
        ((1, 3), "full"),
    ]


def test_layers_that_share_a_mask_are_one_group_and_a_window_is_said_all_the_same() -> None:
    (group,) = blocks([32, 32], [None, None]).stacks[0].groups
    assert group.block.sublayers[0].mask == ""
    (group,) = blocks([32, 32], [5, 5]).stacks[0].groups
    assert group.block.sublayers[0].mask == "window 5"


def test_layers_of_another_width_are_a_group_of_their_own() -> None:
    (stack,) = blocks([32, 40, 40], [None] * 3).stacks
    assert [group.layers for group in stack.groups] == [(0,), (1, 2)]
    assert [group.title for group in stack.groups] == ["layer 0", "layers 1-2"]


def test_layers_that_are_one_module_share_their_tensors() -> None:
    (group,) = blocks([32, 32], [None, None], shared=True).stacks[0].groups
    assert group.layers == (0, 1)
    assert group.block.sublayers[0].of("attention.o")[0].tied == ("other layers",)


def test_a_model_without_blocks_says_why() -> None:
    program = convolutions()
    found = outline(program, program.sites)
    assert found.stacks == ()
    assert [part.role for part in found.loose if part.role != "bias"] == ["conv", "head"]
    assert "no softmax, no scaled_dot_product_attention" in found.reasons[0]
    assert "no projection reads another one through a nonlinearity" in found.reasons[1]


def test_every_projection_norm_and_embedding_is_told_exactly_once() -> None:
    for name in zoo.NAMES:
        found = outlined(name)
        told: list[Component] = [*found.loose]
        for stack in found.stacks:
            told += [*stack.stem, *stack.tail, *(part for group in stack.groups for part in group.block.components)]
        ids = [id for part in told for id in part.ids if part.role != "bias"]
        structure = {"block", "attention", "ffn", "attention.core", "ffn.hidden", "bias"}
        assert sorted(ids) == sorted(s.id for s in zoo.traced(name).sites if s.role not in structure), name


def test_ranges_of_layers() -> None:
    assert doctest.testmod(component_variants).failed == 0
    assert ranges(range(80)) == "0-79"
    assert ranges([0, 1, 3, 4, 6, 7, 9, 10, 12]) == "0-1, 3-4, ... 12"
