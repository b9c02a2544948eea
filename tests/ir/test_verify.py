"""The verifier: a broken program for every rule, and the words in which it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn

import peftgraph as pg
from peftgraph.errors import VerifyError
from peftgraph.ir.program import copy_graph, find_node
from peftgraph.ir.verifier import verify
from peftgraph.passes import LoRA

aten = torch.ops.aten


def tuned() -> pg.Program:
    return zoo.traced("nano").apply(LoRA(rank=2))


def wrong_order(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    first = next(node for node in graph.nodes if node.op == "call_function")
    graph.output_node().prepend(first)
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


def nobody_claims(program: pg.Program) -> pg.Program:
    return program.evolve(edits=program.edits[1:])


def unread_trainable(program: pg.Program) -> pg.Program:
    graph = copy_graph(program.graph)
    move = program.edits[0].moves[0]
    after, before = find_node(graph, move.after), find_node(graph, move.anchor)
    for user in list(after.users):
        user.replace_input_with(after, before)
    return program.evolve(graph=graph)


def lost_node(program: pg.Program) -> pg.Program:
    edit = replace(program.edits[0], nodes=(*program.edits[0].nodes, "nowhere"))
    return program.evolve(edits=(edit, *program.edits[1:]))


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


BREACHES: dict[Callable[[pg.Program], pg.Program], str] = {
    wrong_order: "which does not come before it",
    same_label: "two values are printed as",
    no_label: "has no printed name",
    missing_tensor: "@vocab.weight is not in the table",
    reshaped_tensor: r"@vocab.weight has shape \(5, 5\)",
    base_that_trains: "@vocab.weight requires grad: True, trainable: False",
    nobody_claims: "trains but no edit claims it",
    unread_trainable: "trains but reaches no output",
    lost_node: "lists %nowhere, which does not exist",
    wrong_shape: "recorded is",
    impossible_call: "cannot be computed",
}


@pytest.mark.parametrize(("breach", "words"), BREACHES.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_broken_program_is_refused(breach: Callable[[pg.Program], pg.Program], words: str) -> None:
    program = tuned()
    verify(program)
    with pytest.raises(VerifyError, match=words):
        verify(breach(program))
