"""Blocks as submodules: the marked nodes of a graph become calls of modules at the blocks' own paths.

Parameters keep their names. Blocks whose code reads the same share one function, and what a block reads besides its
own tensors (masks, rotary tables, parameters that several blocks share) comes in as arguments.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx, nn
from torch.fx.node import map_arg

from peftgraph.runtime.block_module import BlockModule
from peftgraph.runtime.block_regions import BLOCK_KEY, BlockRegion
from peftgraph.runtime.codegen import Code
from peftgraph.runtime.sharding import gathered
from peftgraph.runtime.training_region import STREAM_KEY, TrainingRegion

Unit = list[fx.Node]


@dataclass
class BlockGraph:
    """The nodes of a block as a graph of its own, which reads the tensors below the block's path."""

    path: str
    graph: fx.Graph
    inputs: list[fx.Node] = field(default_factory=list[fx.Node])
    outputs: list[fx.Node] = field(default_factory=list[fx.Node])


def outline_blocks(
    graph: fx.Graph,
    blocks: Sequence[BlockRegion],
    name: str,
    compiled: Callable[[fx.Graph], Code],
    root: nn.Module,
    region: Callable[[fx.Graph, Code], TrainingRegion | None],
) -> fx.Graph:
    """Return `graph` with each marked block replaced by a call of a module; the modules get the code of their blocks.

    Args:
        graph: the graph to cut, marked by `mark_block_regions`. Blocks that cannot be called as a unit lose their
            marks.
        blocks: the blocks, which the marks number.
        name: of the graph; the modules store their code under it.
        compiled: compiles a graph.
        root: the module that has a `Block` at each path.
        region: makes what trains a block with code of its own; None where the plain code does.
    """
    new, made = fx.Graph(), dict[fx.Node, fx.Node]()
    times: dict[str, int] = {}
    for unit in _in_order(_units(graph)):
        number = unit[0].meta.get(BLOCK_KEY)
        if number is None:
            made[unit[0]] = new.node_copy(unit[0], lambda operand: made[operand])
            if unit[0].op == "get_attr" and _is_inside(str(unit[0].target), blocks):
                made[unit[0]] = new.call_function(gathered, (made[unit[0]],))
            continue
        piece = _piece(unit, blocks[number])
        count = times[piece.path] = times.get(piece.path, -1) + 1  # a block that several layers share runs often
        block = root.get_submodule(piece.path)
        assert isinstance(block, BlockModule)
        key = f"{name}{count or ''}"
        code = block._peftgraph_codes[key] = compiled(piece.graph)
        if (trained := region(piece.graph, code)) is not None:
            block._peftgraph_regions[key] = trained
        inputs = [made[node] for node in piece.inputs]
        call = new.call_module(piece.path, (key, *inputs))
        for i, node in enumerate(piece.outputs):
            made[node] = new.call_function(operator.getitem, (call, i))
    return new


def _is_inside(name: str, blocks: Sequence[BlockRegion]) -> bool:
    """Whether a tensor that code outside of the blocks reads belongs to one of them."""
    return any(name.startswith(f"{block.path}.") for block in blocks)


def _units(graph: fx.Graph) -> list[Unit]:
    """Group the nodes of each block, and every other node alone, in order of their first node."""
    together: dict[int, Unit] = {}
    found: list[Unit] = []
    for node in graph.nodes:
        number = node.meta.get(BLOCK_KEY)
        if number in together:
            together[number].append(node)
            continue
        found.append([node])
        if number is not None:
            together[number] = found[-1]
    return found


def _in_order(units: list[Unit]) -> list[Unit]:
    """Order the units so that each follows the ones that it reads. Blocks that read one another are split into
    nodes."""
    done, left = _sorted(units)
    while left:
        torn = next(unit for unit in left if BLOCK_KEY in unit[0].meta)
        for node in torn:
            del node.meta[BLOCK_KEY]
        units = [unit for unit in units if unit is not torn] + [[node] for node in torn]
        order = {node: i for i, node in enumerate(torn[0].graph.nodes)}
        done, left = _sorted(sorted(units, key=lambda unit: order[unit[0]]))
    return done


def _sorted(units: list[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Sort the units topologically, the earlier first where there is a choice; also return those that depend on one
    another."""
    home = {node: i for i, unit in enumerate(units) for node in unit}
    waits = [{home[o] for node in unit for o in node.all_input_nodes} - {i} for i, unit in enumerate(units)]
    readers: list[list[int]] = [[] for _ in units]
    for i, sources in enumerate(waits):
        for source in sources:
            readers[source].append(i)
    left = [len(sources) for sources in waits]
    ready = [i for i, count in enumerate(left) if count == 0]
    done: list[int] = []
    while ready:
        done.append(heapq.heappop(ready))
        for reader in readers[done[-1]]:
            left[reader] -= 1
            if left[reader] == 0:
                heapq.heappush(ready, reader)
    rest = set(range(len(units))) - set(done)
    return [units[i] for i in done], [units[i] for i in sorted(rest)]


def _piece(unit: Unit, block: BlockRegion) -> BlockGraph:
    """Return the nodes of a block under names that do not depend on which block it is."""
    inside, path = set(unit), block.path
    piece = BlockGraph(path, fx.Graph())
    piece.inputs = list(dict.fromkeys(o for node in unit for o in node.all_input_nodes if o not in inside))
    made = {node: piece.graph.placeholder(f"x{i}") for i, node in enumerate(piece.inputs)}
    for node, placeholder in made.items():
        placeholder.meta = {**node.meta, STREAM_KEY: node.name == block.input}
    for i, node in enumerate(unit):
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: made[operand])
        target = str(node.target).removeprefix(f"{path}.") if node.op == "get_attr" else node.target
        made[node] = piece.graph.create_node(node.op, target, args, kwargs, name=f"v{i}")
        made[node].meta = dict(node.meta)
    piece.outputs = [node for node in unit if any(user not in inside for user in node.users)]
    piece.graph.output([made[node] for node in piece.outputs])
    return piece
