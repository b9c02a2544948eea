"""What lies between the queries and keys of an attention and its result, where factors may depend on a head's size."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, fx

from peftgraph.rewrite.match import Match
from peftgraph.rewrite.narrow.pruning import attention_key
from peftgraph.sites import Site
from peftgraph.sites.dataflow import ops


class Scores:
    """The calls between queries or keys and the result of every attention.

    Attributes:
        calls: these calls, by graph name.
        rotated: the attentions in which a table multiplies queries or keys, as `attention_key` gives them, each with
            how many features in a row are kept together: 2 where neighbours are a pair, else 1.
    """

    def __init__(self, m: Match) -> None:
        self.calls = set[str]()
        self.rotated = dict[Hashable, int]()
        self._m = m
        for core in (site for site in m.sites if site.role == "attention.core"):
            inside = self._inside(core)
            self.calls |= {node.name for node in inside}
            if any(self._is_rotation(node, inside) for node in inside):
                self.rotated[attention_key(core)] = 2 if any(map(_takes_pairs, inside)) else 1

    def has(self, node: fx.Node) -> bool:
        """Tell whether a call lies there."""
        return node.name in self.calls

    def _inside(self, core: Site) -> set[fx.Node]:
        names, stop = self._m.names, self._m.names[core.op]
        mine = [site for site in self._m.sites if site.role in ("attention.q", "attention.k")]
        todo = [names[site.op] for site in mine if attention_key(site) == attention_key(core)]
        below = set(todo)
        while todo:
            node = todo.pop()
            users = [] if node is stop else [one for one in node.users if one not in below]
            below.update(users)
            todo += users
        above, todo = {stop}, [stop]
        while todo:
            operands = [one for one in todo.pop().all_input_nodes if one in below and one not in above]
            above.update(operands)
            todo += operands
        return above

    def _is_rotation(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        """Tell whether a call multiplies features by a table that is not stored."""
        if ops.name(node) != "mul":
            return False
        others = [one for one in node.all_input_nodes if one not in inside and one.op == "call_function"]
        values = [one.meta["val"] for one in others]
        return any(isinstance(one, Tensor) and one.dim() > 1 and one.shape[-1] != 1 for one in values)


def _takes_pairs(node: fx.Node) -> bool:
    """Tell whether a call takes every other feature, or views features as pairs."""
    value = node.meta["val"]
    if ops.name(node) == "slice":
        return node.args[4:5] == (2,)
    if ops.name(node) not in ("view", "reshape", "unflatten") or not isinstance(value, Tensor):
        return False
    return value.dim() > 4 and str(value.shape[-1]) == "2"
