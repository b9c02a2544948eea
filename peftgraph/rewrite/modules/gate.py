"""Gates: one number for each example, which scales the result of a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import fx

from peftgraph.errors import PeftGraphError
from peftgraph.ir.builder import Builder
from peftgraph.rewrite.checks import check_gated
from peftgraph.rewrite.match import Match
from peftgraph.rewrite.rule import Rule
from peftgraph.rewrite.sequence.token_inputs import find_token_inputs, read_token_mask, to_device_of
from peftgraph.sites.ports import input_port

aten = torch.ops.aten

VIEWS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}


class Gate(Protocol):
    """Builds a gate: (batch,) numbers."""

    def __call__(self, m: Match, op: Builder, x_BTD: fx.Node, /) -> fx.Node:
        """Return the gate at a site, from the rule's input there: x (batch, positions, features)."""
        ...


def gated(rule: Rule, gate: Gate) -> Rule:
    """Return a rule whose delta is scaled by a gate: `join(y, delta)` -> `join(y, g(x) delta)`.

    An added value is multiplied by g; a factor f becomes 1 + g (f - 1); a replacement z of y becomes y + g (z - y);
    rows of keys and values are both multiplied by g.

    Args:
        rule: any rule that computes something.
        gate: builds g, (batch,).

    Raises:
        PeftGraphError: the rule computes nothing new, or (on application) its input is no batch of sequences.
    """
    build = rule.delta
    if build is None:
        raise PeftGraphError(f"The parameters at {rule.at} train in place: there is nothing that a gate could let in.")

    def delta(m: Match, op: Builder) -> fx.Node | Mapping[str, fx.Node]:
        change = build(m, op)
        if not m.has(rule.join.port):
            raise PeftGraphError(f"{m.site} gives no value of its own that a gate could weigh. Choose other sites.")
        x_BTD = _sequence(m, m.input if rule.gate_input is None else rule.gate_input(m, op))
        parts = [change] if isinstance(change, fx.Node) else change.values()
        axes = max(part.meta["val"].dim() for part in (*parts, m.value(rule.join.port)))
        opening = gate(m, op, x_BTD)
        if axes == 2:  # (batch * positions, features)
            sizes = [op.call(aten.sym_size.int, x_BTD, axis) for axis in (0, 1)]
            opening = op.call(aten.expand.default, op.call(aten.unsqueeze.default, opening, 1), sizes)
        opening = op.call(aten.reshape.default, opening, [-1, *[1] * (axes - 1)])
        return check_gated(op.pass_spec, m, rule.join, change, opening, rule.join.gate(m, op, change, opening))

    return replace(rule, delta=delta, fold="its gate depends on the input", max_rank=None)


def _sequence(m: Match, x: fx.Node) -> fx.Node:
    """Return a site's input as (batch, positions, features), also where its first two axes are merged."""
    shape = x.meta["val"].shape
    source = x.args[0] if x.target in VIEWS else None
    if len(shape) == 3 and not m.experts:
        return x
    if len(shape) == 2 and isinstance(source, fx.Node) and not m.experts and source.meta["val"].dim() == 3:
        return source
    raise PeftGraphError(
        f"{m.site.id} reads {' x '.join(map(str, shape))}, which is no (batch, positions, features): a gate is a "
        "number for each example. Choose sites outside of routed experts and convolutions."
    )


def masked_mean(m: Match, op: Builder, x_BT1: fx.Node, tokens_only: bool) -> fx.Node:
    """Return the mean of x (B, T, 1) over the positions, (B,): over all of them, or over those that contain tokens.

    All positions contain tokens unless an input of the model says otherwise.

    Raises:
        PeftGraphError: such an input is no (batch, positions).
    """
    x_BT, length = op.call(aten.squeeze.dim, x_BT1, -1), x_BT1.meta["val"].shape[1]
    inputs = find_token_inputs(m, length) if tokens_only and not isinstance(length, int) else None
    if inputs is not None:
        for name in inputs.along:
            if len(m.value(input_port(name)).meta["val"].shape) != 2:
                raise PeftGraphError(f"The input {name} is no (batch, positions): it is not known what hides padding.")
    if inputs is None or inputs.mask is None:
        return op.call(aten.mean.dim, x_BT, [1])
    real_BT = to_device_of(op, read_token_mask(m, op, inputs.mask), x_BT)
    total_B = op.call(aten.sum.dim_IntList, op.mul(x_BT, real_BT), [1])
    count_B = op.call(aten.sum.dim_IntList, real_BT, [1])
    return op.call(aten.div.Tensor, total_B, op.call(aten.clamp.default, count_B, 1))
