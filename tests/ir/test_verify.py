"""The verifier: a broken program for every breach that a rule knows, and the words in which it is refused."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import fx, nn

import peftgraph as pg
from peftgraph.errors import VerifyError
from peftgraph.ir.edits import Edit
from peftgraph.ir.graphs import copy_graph, find_node
from peftgraph.ir.shape_inference import ShapeInference, fake_mode_of
from peftgraph.ir.tensor_table import TensorEntry
from peftgraph.ir.verifier import (
    CHECKS,
    Check,
    edits_stand,
    names_are_unique,
    operands_come_first,
    stored_tensors_exist,
    trainables_are_claimed,
    trainables_reach_the_output,
    values_rederive,
    verify,
)
from peftgraph.passes import LoRA

aten = torch.ops.aten


def tuned() -> pg.Program:
    return zoo.traced("nano").apply(LoRA(rank=2))


def wrong_order(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    first = next(node for node in graph.nodes if node.op == "call_function")
    graph.output_node().prepend(first)
    return program.evolve(graph=graph)


def foreign_operand(program: pg.Program) -> pg.Program:
    graph, other = copy_graph(program.graph), copy_graph(program.graph)
    node = next(node for node in graph.nodes if node.target is aten.layer_norm.default)
    node.update_arg(0, find_node(other, node.all_input_nodes[0].name))
    return program.evolve(graph=graph)


def same_label(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    one, two = [node for node in graph.nodes if node.op == "call_function"][:2]
    two.meta["label"] = one.meta["label"]
    return program.evolve(graph=graph)


def no_label(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    del next(node for node in graph.nodes if node.op == "call_function").meta["label"]
    return program.evolve(graph=graph)


def missing_tensor(program: pg.Program) -> pg.Program:
    return program.evolve(table=program.table.without(["vocab.weight"]))


def reshaped_tensor(program: pg.Program) -> pg.Program:
    return program.evolve(table=program.table.with_tensor("vocab.weight", torch.zeros(5, 5)))


def base_that_trains(program: pg.Program) -> pg.Program:
    return program.evolve(
        table=program.table.with_tensor("vocab.weight", nn.Parameter(torch.zeros(zoo.VOCAB, zoo.WIDTH)))
    )


def first_trainable(program: pg.Program) -> tuple[str, nn.Parameter]:
    return next(iter(program.table.trainable.items()))


def with_tensor(program: pg.Program, name: str, tensor: torch.Tensor) -> pg.Program:
    return program.evolve(table=program.table.with_tensor(name, tensor))


def trainable_that_is_frozen(program: pg.Program) -> pg.Program:
    name, parameter = first_trainable(program)
    return with_tensor(program, name, nn.Parameter(parameter.detach(), requires_grad=False))


def trainable_that_is_no_parameter(program: pg.Program) -> pg.Program:
    name, parameter = first_trainable(program)
    return with_tensor(program, name, parameter.detach().clone().requires_grad_())


def with_first_edit(program: pg.Program, **changes: object) -> pg.Program:
    first: Edit = replace(program.edits[0], **changes)  # pyright: ignore[reportArgumentType]
    return program.evolve(edits=(first, *program.edits[1:]))


def claim_of_nothing(program: pg.Program) -> pg.Program:
    return with_first_edit(program, parameters=(*program.edits[0].parameters, "nowhere"))


def trainable_that_nothing_reads(program: pg.Program) -> pg.Program:
    extra = TensorEntry(nn.Parameter(torch.zeros(2)), "parameter", trainable=True, added=True)
    program = program.evolve(table=program.table.updated({"extra": extra}))
    return with_first_edit(program, parameters=(*program.edits[0].parameters, "extra"))


def nobody_claims(program: pg.Program) -> pg.Program:
    return program.evolve(edits=program.edits[1:])


def unread_trainable(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    move = program.edits[0].moves[0]
    after, before = find_node(graph, move.after), find_node(graph, move.anchor.value)
    for user in list(after.users):
        user.replace_input_with(after, before)
    return program.evolve(graph=graph)


def lost_node(program: pg.Program) -> pg.Program:
    return with_first_edit(program, nodes=(*program.edits[0].nodes, "nowhere"))


def lost_move(program: pg.Program) -> pg.Program:
    move, *others = program.edits[0].moves
    return with_first_edit(program, moves=(replace(move, after="nowhere"), *others))


def unlisted_node(program: pg.Program) -> pg.Program:
    return with_first_edit(program, nodes=program.edits[0].nodes[1:])


def wrong_shape(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    node = next(node for node in graph.nodes if node.target is aten.layer_norm.default)
    node.meta["val"] = node.meta["val"].sum(-1)
    return program.evolve(graph=graph)


def impossible_call(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    node = next(node for node in graph.nodes if node.target is aten.layer_norm.default)
    node.update_arg(1, [zoo.WIDTH + 1])
    return program.evolve(graph=graph)


BREACHES: list[tuple[Check | Callable[..., object], Callable[[pg.Program], pg.Program], str]] = [
    (operands_come_first, wrong_order, "which does not come before it"),
    (operands_come_first, foreign_operand, "which does not come before it"),
    (names_are_unique, same_label, "two values are printed as"),
    (names_are_unique, no_label, "has no printed name"),
    (stored_tensors_exist, missing_tensor, "@vocab.weight is not in the table"),
    (stored_tensors_exist, reshaped_tensor, r"@vocab.weight has shape \(5, 5\)"),
    (trainables_are_claimed, base_that_trains, "@vocab.weight requires grad: True, trainable: False"),
    (trainables_are_claimed, trainable_that_is_frozen, "requires grad: False, trainable: True"),
    (trainables_are_claimed, nobody_claims, "trains but no edit claims it"),
    (trainables_are_claimed, trainable_that_is_no_parameter, "trains but is no nn.Parameter"),
    (trainables_are_claimed, claim_of_nothing, "an edit claims @nowhere, which is not in the table"),
    (trainables_reach_the_output, unread_trainable, "trains but reaches no output"),
    (trainables_reach_the_output, trainable_that_nothing_reads, "@extra trains but the graph does not read it"),
    (edits_stand, lost_node, "lists %nowhere, which does not exist"),
    (edits_stand, lost_move, "lists %nowhere, which does not exist"),
    (edits_stand, unlisted_node, "but no edit lists it"),
    (values_rederive, wrong_shape, "recorded is"),
    (values_rederive, impossible_call, "cannot be computed"),
]


@pytest.mark.parametrize(("rule", "breach", "words"), BREACHES, ids=lambda item: getattr(item, "__name__", ""))
def test_a_broken_program_is_refused(rule: Check, breach: Callable[[pg.Program], pg.Program], words: str) -> None:
    program = tuned()
    verify(program)
    broken = breach(program)
    with pytest.raises(VerifyError, match=words) as caught:
        verify(broken)
    if rule in CHECKS:
        assert set(rule(broken)) <= {line.strip() for line in str(caught.value).splitlines()}
        assert any(re.search(words, one) for one in rule(broken))


@pytest.mark.parametrize("rule", [*CHECKS, values_rederive], ids=lambda rule: rule.__name__)
def test_every_breach_that_a_rule_yields_has_a_broken_program(rule: Check) -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    messages = sum(isinstance(node, ast.Yield) for node in ast.walk(tree))
    words = {words for one, _, words in BREACHES if one is rule}
    assert len(words) >= messages > 0


def test_what_a_verified_program_has_already_is_not_derived_again() -> None:
    program = tuned()

    class Inferring(ShapeInference):
        def value_of(self, node: fx.Node) -> Any:
            seen.append(node.name)
            return super().value_of(node)

    seen: list[str] = []
    inference = Inferring(fake_mode_of(program.graph))
    verify(program, program, inference)
    assert not seen
    with pytest.raises(VerifyError, match="recorded is"):
        verify(wrong_shape(program), program, inference)
    with pytest.raises(VerifyError, match="cannot be computed"):
        verify(with_first_target(program, aten.mm.default), program, inference)
    assert len(seen) < 10


def with_first_target(program: pg.Program, target: Callable[..., Any]) -> pg.Program:
    graph = copy_graph(program.graph)
    next(node for node in graph.nodes if node.op == "call_function").target = target
    return program.evolve(graph=graph)
