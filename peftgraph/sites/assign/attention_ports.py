"""The ports of an attention core: its operands, who reads them, and what their axes hold."""

from __future__ import annotations

from torch import fx

from peftgraph.sites.assign.attention import Attention
from peftgraph.sites.assign.collection import Ports
from peftgraph.sites.assign.operand_axes import operand_axes
from peftgraph.sites.dataflow.flow import Flow
from peftgraph.sites.dataflow.grouped import rows_by_head, untransposed
from peftgraph.sites.matchers.anatomy import Anatomy
from peftgraph.sites.matchers.attention_cores import Core
from peftgraph.sites.site import Axes


def operands_of(anatomy: Anatomy, one: Attention) -> tuple[Ports, Ports, dict[str, Axes]]:
    """Return the ports of a core, who reads them where it is written out, and the axes of some of them.

    `q`, `k`, `v`, `mask` and `output` are what scaled_dot_product_attention has of them: `k` is not transposed for the
    product, where it is `scored`. `keys` and `values` are k and v before they are repeated for the queries that share
    them.
    """
    flow, core = anatomy.flow, one.core
    axes = operand_axes(anatomy, one)
    ports: Ports = {"q": core.q, "k": core.k, "v": core.v, "output": core.output, "mask": core.mask}
    ports |= {f"product{i}" if i else "product": node for i, node in enumerate(core.products)}
    if core.products:
        ports |= {"k": untransposed(flow, core.k), "scored": core.k, "scores": core.scores}
    if "scored" in axes:
        words = axes["scored"].words
        swapped = bool(core.products) and ports["k"] is not core.k
        axes["k"] = Axes((*words[:-2], words[-1], words[-2]) if swapped else words, axes["scored"].heads)
    ports |= {"keys": rows_by_head(flow, core.k), "values": rows_by_head(flow, core.v)}
    return ports, _readers(flow, core) if core.products else {}, axes


def _readers(flow: Flow, core: Core) -> Ports:
    """Return who reads the operands of an attention that is written out."""
    start, product = untransposed(flow, core.k), core.products[0]
    way = [*flow.between(start, core.k), core.k] if start is not core.k else [product]
    found: Ports = {"q": product, "k": next(one for one in way if start in one.all_input_nodes)}
    found["v"] = core.output
    if core.mask is not None:
        masked = [user for user in core.mask.users if _between(flow, user, core)]
        found["mask"] = max(masked, key=flow.order.__getitem__, default=None)
    return found


def _between(flow: Flow, node: fx.Node, core: Core) -> bool:
    """Tell whether a node is between the scores and the softmax's argument."""
    assert core.scores is not None, core.node
    return flow.descends(core.scores, node) and any(flow.descends(node, one) for one in core.products)
