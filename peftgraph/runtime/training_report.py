"""Tells what optimised blocks keep between the passes, beside the plain graph, and why some are not optimised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peftgraph.runtime.block_module import BlockModule
from peftgraph.runtime.training_region import TrainingRegion

MIB = 2**20


@dataclass(frozen=True)
class RegionCost:
    """What blocks of one kind cost in one kind of call.

    Attributes:
        blocks: their paths.
        plain_bytes: what the plain graph keeps of one block for the backward pass, besides the block's inputs.
        kept_bytes: what the optimised block keeps.
        repeated: multiplications and additions of the products that its backward pass computes again.
        products: the number of matrix products of both passes, as torch differentiates the block, and optimised.
        values: the largest kept values, as operator, sizes and bytes.
    """

    blocks: tuple[str, ...]
    plain_bytes: int
    kept_bytes: int
    repeated: int
    products: tuple[int, int]
    values: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class TrainingReport:
    """What optimising has done for the training of a module, in the calls so far.

    Attributes:
        costs: by kind of block and call.
        refusals: the reasons for which blocks run the plain code, by their paths.
    """

    costs: tuple[RegionCost, ...]
    refusals: tuple[tuple[tuple[str, ...], str], ...]

    def __str__(self) -> str:
        if not self.costs and not self.refusals:
            return "No block has run with an optimised backward pass."
        lines = [f"{'blocks':32} {'kept, MiB':>10} {'plain, MiB':>10} {'products':>10} {'repeated':>10}"]
        for cost in self.costs:
            products = f"{cost.products[0]} -> {cost.products[1]}"
            lines.append(
                f"{_range(cost.blocks):32} {cost.kept_bytes / MIB:10.2f} {cost.plain_bytes / MIB:10.2f} "
                f"{products:>10} {cost.repeated:10.2e}"
            )
            lines += [f"    {word} {sizes}: {size / MIB:.2f} MiB" for word, sizes, size in cost.values]
        lines += [f"{_range(blocks)} not optimised: {reason}" for blocks, reason in self.refusals]
        return "\n".join(lines)


def report_training(net: nn.Module) -> TrainingReport:
    """Return what optimising has done for a module in the training steps so far."""
    paths: dict[int, list[str]] = {}
    regions: dict[int, TrainingRegion] = {}
    for path, block in net.named_modules():
        for region in block._peftgraph_regions.values() if isinstance(block, BlockModule) else ():
            regions[id(region)] = region
            paths.setdefault(id(region), []).append(path)
    costs = [cost for key, region in regions.items() for cost in _costs(tuple(paths[key]), region)]
    refusals = [
        (tuple(paths[key]), reason) for key, region in regions.items() for reason in dict.fromkeys(region.refusals)
    ]
    return TrainingReport(tuple(costs), tuple(refusals))


def _costs(paths: tuple[str, ...], region: TrainingRegion) -> list[RegionCost]:
    found: list[RegionCost] = []
    for code in region.codes.values():
        if code is not None and code.check is not None:
            plan, check, graphs = code.graphs.plan, code.check, code.graphs
            found.append(
                RegionCost(
                    paths, check.plain_bytes, check.kept_bytes, plan.repeated, graphs.products, plan.largest_values()
                )
            )
    return found


def _range(paths: Sequence[str]) -> str:
    """Write the paths of a stack shortly: layers.0 to layers.7."""
    if len(paths) < 3:
        return ", ".join(paths)
    first, last = paths[0], re.split(r"\D", paths[-1])[-1]
    return f"{first} to {last} ({len(paths)})"
