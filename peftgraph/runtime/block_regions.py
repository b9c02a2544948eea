"""Which nodes of a graph are a block: what lies between its input and its output, and what only that reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from peftgraph.ir.dead_code import live_nodes, writes_in_place
from peftgraph.ir.edits import EditLog
from peftgraph.ir.program import ProgramData
from peftgraph.sites import Sites

BLOCK_KEY = "block"  # in a node's metadata: the number of its block


@dataclass(frozen=True)
class BlockRegion:
    """A block of a program: the path of its module, and the values that enter and leave its residual stream."""

    path: str
    input: str
    output: str


def find_block_regions(program: ProgramData, sites: Sites) -> list[BlockRegion]:
    """Return the blocks of a program as passes left them; those without a module path of their own are omitted."""
    edits, found = EditLog(program.edits), list[BlockRegion]()
    for site in sites:
        if site.role == "block" and site.path and {"input", "output"} <= site.ports.keys():
            ends = (site.ports["input"], site.ports["output"])
            first, last = (line[-1].after if (line := edits.moves_at(name)) else name for name in ends)
            found.append(BlockRegion(site.path, first, last))
    return found


def mark_block_regions(graph: fx.Graph, blocks: Sequence[BlockRegion]) -> None:
    """Write into the metadata of every node of a block, in place, which block it belongs to.

    No value leaves a block and returns to it: the marked nodes are those on paths from its input to its output, and
    those that nothing else reads.
    """
    order = live_nodes(graph)
    place = {node.name: i for i, node in enumerate(order)}
    for number, block in enumerate(blocks):
        if block.input in place and block.output in place:
            window = order[place[block.input] : place[block.output] + 1]
            for node in _between(window):
                node.meta.setdefault(BLOCK_KEY, number)
    _mark_private(order, blocks)
    for number in _writers(order):
        _unmark(order, number)


def _between(window: Sequence[fx.Node]) -> Iterable[fx.Node]:
    """Return the nodes on paths from the first node to the last one, without the first."""
    if len(window) < 2:
        return ()
    below = {window[0]}
    for node in window[1:]:
        if not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    above = {window[-1]}
    for node in reversed(window):
        if node in above:
            above.update(node.all_input_nodes)
    return [node for node in window[1:] if node in below and node in above]


def _mark_private(order: Sequence[fx.Node], blocks: Sequence[BlockRegion]) -> None:
    """Mark the nodes that only one block reads, such as keys of its cross-attention; stored tensors only if they are
    the block's own."""
    alive = set(order)
    for node in reversed(order):
        readers: set[int | None] = {user.meta.get(BLOCK_KEY) for user in node.users if user in alive}
        number = readers.pop() if len(readers) == 1 else None
        if number is None or BLOCK_KEY in node.meta or node.op == "placeholder" or node.name == blocks[number].input:
            continue
        if node.op != "get_attr" or str(node.target).startswith(f"{blocks[number].path}."):
            node.meta[BLOCK_KEY] = number


def _writers(order: Sequence[fx.Node]) -> set[int]:
    """Return the blocks that write into a value from outside the block."""
    return {
        node.meta[BLOCK_KEY]
        for node in order
        if BLOCK_KEY in node.meta
        and writes_in_place(node)
        and any(operand.meta.get(BLOCK_KEY) != node.meta[BLOCK_KEY] for operand in node.all_input_nodes)
    }


def _unmark(order: Iterable[fx.Node], number: int) -> None:
    for node in order:
        if node.meta.get(BLOCK_KEY) == number:
            del node.meta[BLOCK_KEY]
