"""Which layers share a kind of attention mask, and how wide a sliding window is, from the graph that makes the mask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from peftgraph.sites import Site, Sites

COMPARISONS = {"gt", "ge", "lt", "le"}


def masks(graph: fx.Graph, sites: Sites) -> dict[str, str]:
    """Site id of an attention core -> "window 4096", "full", "mask A" ...; nothing where a stack is masked alike.

    Two masks are alike when the same operators with the same literals make them. Cross-attention does not count, nor
    does a mask that is computed from the layers themselves.
    """
    nodes = {node.name: node for node in graph.nodes}
    inner = {nodes[site.op] for site in sites if site.layer is not None}
    digests: dict[fx.Node, int] = {}
    stacks: dict[str, dict[str, tuple[int, int | None]]] = {}
    for site in sites:
        if site.role == "attention.core" and site.kind != "cross":
            kind = _kind(nodes, site, inner, digests)
            if kind is not None:
                stacks.setdefault(site.stack or "", {})[site.id] = kind
    return {core: name for kinds in stacks.values() for core, name in _named(kinds).items() if name}


def _kind(
    nodes: Mapping[str, fx.Node], site: Site, inner: set[fx.Node], digests: dict[fx.Node, int]
) -> tuple[int, int | None] | None:
    mask = site.ports.get("mask")
    if mask is None:
        return 0, None
    made_of = _cone(nodes[mask])
    if made_of & inner:
        return None
    return _digest(nodes[mask], digests), next((n for n in map(_window, made_of) if n is not None), None)


def _named(kinds: Mapping[str, tuple[int, int | None]]) -> dict[str, str]:
    names = _names(kinds)
    return {core: names[kind] for core, kind in kinds.items()}


def _names(kinds: Mapping[str, tuple[int, int | None]]) -> dict[tuple[int, int | None], str]:
    different = list(dict.fromkeys(kinds.values()))
    windows = [window for _, window in different if window is not None]
    if windows and len(set(windows)) == len(windows) and len(different) - len(windows) <= 1:
        return {kind: f"window {kind[1]:,}" if kind[1] is not None else "full" for kind in different}
    if len(different) == 1:
        return dict.fromkeys(different, "")
    return {kind: f"mask {chr(ord('A') + place)}" for place, kind in enumerate(different[:26])} | dict.fromkeys(
        different[26:], "mask other"
    )


def _cone(node: fx.Node) -> set[fx.Node]:
    seen, todo = {node}, [node]
    while todo:
        for one in todo.pop().all_input_nodes:
            if one not in seen:
                seen.add(one)
                todo.append(one)
    return seen


def _digest(node: fx.Node, known: dict[fx.Node, int]) -> int:
    """Return a hash of the computation that ends in a node; stored tensors are represented by their shapes."""
    todo = [node]
    while todo:
        here = todo[-1]
        missing = [one for one in here.all_input_nodes if one not in known]
        if here in known or not missing:
            todo.pop()
            if here.op == "call_function":
                arguments = fx.map_arg((here.args, here.kwargs), lambda one: known[one])
                known[here] = hash((str(here.target), repr(arguments)))
            elif here.op == "get_attr":
                known[here] = hash(str(getattr(here.meta.get("val"), "shape", "")))
            else:
                known[here] = hash(here.name)
        else:
            todo.extend(missing)
    return known[node]


def _window(node: fx.Node) -> int | None:
    """Return n if a node compares positions with positions shifted by n."""
    if _name(node) not in COMPARISONS:
        return None
    for side in node.args:
        if isinstance(side, fx.Node) and _name(side) in ("sub", "add") and len(side.args) == 2:
            moved = side.args[1]
            if isinstance(moved, int) and (moved if _name(side) == "sub" else -moved) > 0:
                return abs(moved)
    return None


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(node.op)
