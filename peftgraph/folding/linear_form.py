"""Checks that a site's operator computes y = x W^T + b of the stored W and b, so that a change of y is one of W and b.

Only the base's graph is read: which operators lie between a stored tensor and the operator that reads it, and by what
that operator multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from peftgraph.ir.graphs import stored_tensor_nodes
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.weight_views import View, bias_view, weight_view
from peftgraph.sites import Site
from peftgraph.sites.dataflow import ops

FACTORS = {"addmm": ("alpha", "beta"), "baddbmm": ("alpha", "beta"), "addbmm": ("alpha", "beta")}
ADDENDS = {"linear": (2, "bias"), **dict.fromkeys(FACTORS, (0, "self"))}
ADDENDS |= dict.fromkeys(ops.CONV, (2, "bias"))
SPREAD = ops.words("expand expand_as broadcast_to view_as reshape_as contiguous clone alias detach lift_fresh_copy")
PICKED = ops.words("index index_select gather take_along_dim")


class LinearForm:
    """Knows the operators of a base and how they read stored tensors.

    Args:
        program: any program of the base.
    """

    def __init__(self, program: ProgramData) -> None:
        base = program.base if program.base is not None else program
        self._table = base.table
        self._nodes: dict[str, fx.Node] = {node.name: node for node in base.graph.nodes}
        self._stored = {node: str(node.target) for node in stored_tensor_nodes(base.graph)}

    def weight_reason(self, site: Site) -> str | None:
        """Return why a change of a site's weight is not equivalent to a change of its output; None when it is."""
        view = weight_view(site)
        if view is None:
            return None
        node = self._nodes[site.op]
        factor = _factor(node, 0)
        if factor != 1:
            return f"%{_label(node)} multiplies its product by {factor}, so that y is not x W^T + b"
        return self._path_reason(view, [node])

    def bias_reason(self, site: Site) -> str | None:
        """Return why a change of a site's bias is not equivalent to a change of its output; None when it is."""
        view = bias_view(site)
        if view is None:
            return None
        adders = [self._nodes[name] for name in self.adders(site)]
        for node in adders:
            factor = _factor(node, 1)
            if factor != 1:
                return f"%{_label(node)} multiplies the bias by {factor}, so that y is not x W^T + b"
        reason = self._path_reason(view, adders)
        return reason or self._order_reason(site, view, adders)

    def unknown_addend(self, site: Site) -> str | None:
        """Return why the output of a site without a bias is more than its product; None when it is not."""
        node = self._nodes[site.op]
        operand = ops.operand(node, *ADDENDS.get(ops.name(node), (len(node.args), "")))
        return None if operand is None else f"%{_label(node)} adds %{_label(operand)}, which is no bias that is stored"

    def adders(self, site: Site) -> list[str]:
        """Return the operators that may add a site's bias."""
        return list(dict.fromkeys((site.op, site.ports.get("output", site.op))))

    def _path_reason(self, view: View, readers: Sequence[fx.Node]) -> str | None:
        """Return why operators do not read a stored tensor as it is; None when they do."""
        path = self._path(view.parameter, readers)
        if path is None:
            return f"what it reads is computed from {view.parameter}, and is not what is stored"
        precision = torch.finfo(self._table[view.parameter].tensor.dtype).eps
        for node in path:
            value = node.meta.get("val")
            dtype = value.dtype if isinstance(value, Tensor) else None
            if dtype is not None and (not dtype.is_floating_point or torch.finfo(dtype).eps > precision):
                return (
                    f"{view.parameter} is cast to {dtype} on its way to the product, and would be rounded there again"
                )
        return None

    def _path(self, parameter: str, readers: Sequence[fx.Node]) -> list[fx.Node] | None:
        """Return the layout operations and casts from one of the operators back to a stored tensor; None where there
        are other operations in between."""
        names = self._table.tied(parameter)
        for reader in readers:
            for operand in reader.all_input_nodes:
                path = [operand]
                while path[-1] not in self._stored and ops.name(path[-1]) in ops.LAYOUT | ops.CAST:
                    path.append(path[-1].all_input_nodes[0])
                if self._stored.get(path[-1]) in names:
                    return path
        return None

    def _order_reason(self, site: Site, view: View, adders: Sequence[fx.Node]) -> str | None:
        """Check that each feature receives the stored entry that the window of the site's bias assigns to it.

        Returns:
            The reason why not; None when it is.
        """
        path = self._path(view.parameter, adders)
        assert path is not None
        shape = self._table[view.parameter].tensor.shape
        numbers = torch.arange(shape.numel()).reshape(shape)
        wanted = view.get(numbers).flatten()
        for node in reversed(path[:-1]):
            kind = ops.name(node)
            if kind in PICKED and site.weight is not None and site.weight.experts is not None:
                return None  # each row takes the bias of its own expert
            if kind in SPREAD or kind in ops.CAST:
                continue
            if len(node.all_input_nodes) > 1:
                return f"{view.parameter} is put together with other values before it is added"
            numbers = fx.map_arg((node.args, dict(node.kwargs)), lambda _, own=numbers: own)
            assert callable(node.target)
            numbers = node.target(*numbers[0], **numbers[1])
        arrived = numbers.flatten()
        if site.columns is not None:
            arrived = arrived[site.columns.index()]
        if arrived.shape != wanted.shape or not torch.equal(arrived, wanted):
            return f"the entries of {view.parameter} that it adds are others than its weight's, or in another order"
        return None


def _factor(node: fx.Node, which: int) -> object:
    """Return the factor by which an operator multiplies its product (0) or its bias (1)."""
    kind = ops.name(node)
    names = FACTORS.get(kind)
    if names is not None:
        return node.kwargs.get(names[which], 1)
    return node.kwargs.get("alpha", 1) if which and kind in ("add", "sub") else 1


def _label(node: fx.Node) -> str:
    return str(node.meta.get("label", node.name))
