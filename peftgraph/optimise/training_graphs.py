"""Makes the graphs of an optimised forward and backward pass of a part of a program."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import fx

from peftgraph.optimise.clean_up import clean_up
from peftgraph.optimise.in_place import write_in_place
from peftgraph.optimise.joint_graph import JointGraph, trace_joint_graph, with_gradients_of
from peftgraph.optimise.memory_plan import MemoryPlan, is_product, plan_memory
from peftgraph.optimise.partition import Parts, backward_graph, forward_graph
from peftgraph.optimise.products import join_products


@dataclass(frozen=True)
class TrainingGraphs:
    """An optimised forward and backward pass.

    Attributes:
        forward: reads the inputs; returns the outputs, and then the values to keep that are no inputs.
        backward: reads the kept inputs, the other kept values and the gradients by the outputs; returns the gradients
            by the inputs.
        outputs: how many outputs the forward pass has.
        kept_inputs: the positions of the inputs that the backward pass reads.
        differentiable: the positions of the outputs that have gradients.
        wanted: the positions of the inputs that get gradients.
        plan: what is kept.
        products: the number of matrix products of both passes, before and after they were joined.
    """

    forward: fx.Graph
    backward: fx.Graph
    outputs: int
    kept_inputs: tuple[int, ...]
    differentiable: tuple[int, ...]
    wanted: tuple[int, ...]
    plan: MemoryPlan
    products: tuple[int, int]


def optimised_joint_graph(graph: fx.Graph, values: Sequence[Any]) -> JointGraph:
    """Trace both passes of a graph as one, and simplify it.

    Args:
        graph: as for `trace_joint_graph`.
        values: of its inputs in a call, real or fake.

    Raises:
        Exception: torch cannot trace or differentiate an operation of the graph.
    """
    joint = trace_joint_graph(graph, values)
    clean_up(joint.graph)
    return joint


def make_training_graphs(joint: JointGraph, wanted: Set[int], budget: float = 1.0) -> TrainingGraphs:
    """Make the graphs of both passes.

    Args:
        joint: both passes; unchanged.
        wanted: the positions of the inputs by which gradients are needed.
        budget: the fraction of the bytes that are kept when no product is computed again; 0 computes everything again
            from the inputs.
    """
    joint = with_gradients_of(joint, wanted)
    before = sum(map(is_product, joint.graph.nodes))
    join_products(joint.graph)
    products = before, sum(map(is_product, joint.graph.nodes))
    parts = Parts(joint)
    plan = plan_memory(parts, budget)
    passes = forward_graph(parts, plan.kept), backward_graph(parts, plan.kept)
    for one in passes:
        write_in_place(one)
    kept = tuple(i for i, node in enumerate(parts.inputs) if node in plan.kept)
    return TrainingGraphs(*passes, joint.outputs, kept, joint.differentiable, joint.wanted, plan, products)
