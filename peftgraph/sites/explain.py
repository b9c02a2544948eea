"""Why a selector finds nothing: which part never matched, what there is instead, and the nearest miss."""

from __future__ import annotations

from collections.abc import Iterator

from peftgraph.errors import Ambiguous, NoMatch

from .patterns import PatternRole, explain_pattern
from .select import Both, Either, Expert, Kind, Layers, Not, Role, Selector, Stack, Where, as_selector, quoted
from .site import NearMiss, Site, Sites

SOFTMAX_MISS = "no softmax or scaled_dot_product_attention whose operands come from two projections"
JOIN_MISS = "no projection whose result enters a residual add and that reads a projection through a nonlinearity"


def require(sites: Sites, selector: object) -> tuple[Site, ...]:
    """The matches.

    Raises:
        NoMatch: there are none, or an alternative or a filter of the selector is idle.
        Ambiguous: a layer number means a layer in several stacks, and the selector names none.
    """
    chosen = as_selector(selector)
    found = sites.select(chosen)
    if not found:
        raise NoMatch(f"{chosen}: no site. {explain(sites, chosen)}")
    idle = [part for part in _alternatives(chosen) if not sites.select(part)]
    if idle:
        reasons = "\n".join(f"{part}: no site. {explain(sites, part)}" for part in idle)
        raise NoMatch(f"part of {chosen} never matched:\n{reasons}")
    beyond = _beyond(sites, chosen)
    if beyond:
        raise NoMatch(f"{chosen}: {beyond}")
    _refuse_ambiguous(chosen, found)
    return found


def _refuse_ambiguous(chosen: Selector, found: tuple[Site, ...]) -> None:
    parts = list(_flatten(chosen))
    numbers = next((part for part in parts if isinstance(part, Layers)), None)
    stacks = sorted({site.stack for site in found if site.stack and site.layer is not None})
    if numbers is not None and len(stacks) > 1 and not any(isinstance(part, Stack | Where) for part in parts):
        each = "|".join(f"stack({quoted(name)})" for name in stacks)
        raise Ambiguous(
            f"{chosen}: {numbers} is ambiguous, {' and '.join(stacks)} each number their layers from 0. "
            f"Add &stack({quoted(stacks[0])}) for one of them, or &({each}) for all."
        )


def explain(sites: Sites, selector: object) -> str:
    """One paragraph: what matched, or what killed the match and where it got furthest."""
    chosen = as_selector(selector)
    found = sites.select(chosen)
    if found:
        shown = ", ".join(site.id for site in found[:8])
        return f"{len(found)} sites: {shown}{', ...' if len(found) > 8 else ''}"
    return _reason(sites, chosen)


def _reason(sites: Sites, chosen: Selector) -> str:
    if isinstance(chosen, PatternRole):
        return explain_pattern(sites, chosen)
    if isinstance(chosen, Either):
        return "; ".join(_reason(sites, part) for part in _alternatives(chosen))
    if isinstance(chosen, Both):
        return _no_overlap(sites, chosen)
    if isinstance(chosen, Where):
        return _no_path(sites, chosen)
    if isinstance(chosen, Role):
        return _no_role(sites, chosen)
    if isinstance(chosen, Not):
        return f"every site matches {chosen.inner}"
    return _no_filter(sites, chosen)


def _alternatives(selector: Selector) -> Iterator[Selector]:
    """The alternatives of a selector, with the filters that stand around them."""
    if isinstance(selector, Either):
        yield from _alternatives(selector.left)
        yield from _alternatives(selector.right)
    elif isinstance(selector, Both):
        for left in _alternatives(selector.left):
            for right in _alternatives(selector.right):
                yield Both(left, right)
    elif isinstance(selector, Where):
        for inner in _alternatives(selector.inner):
            yield Where(inner, selector.path)
    else:
        yield selector


def _conjuncts(selector: Selector) -> list[Selector]:
    if isinstance(selector, Both):
        return [*_conjuncts(selector.left), *_conjuncts(selector.right)]
    return [selector]


def _no_overlap(sites: Sites, chosen: Both) -> str:
    """Name the conjunct that left nothing."""
    left = sites.items
    for part in _conjuncts(chosen):
        kept = tuple(site for site in left if part.matches(site))
        if not kept:
            if left == sites.items or not sites.select(part):
                return _reason(sites, part)
            return f"{len(left)} sites were left before {part} removed them all: {_features(left)}"
        left = kept
    return "nothing was left"


def _features(left: tuple[Site, ...]) -> str:
    """What the filters could have asked for."""
    layers = sorted({site.layer for site in left if site.layer is not None})
    facts = [f"layers {layers[0]} to {layers[-1]}" if layers else "no layers"]
    for name, values in (
        ("stacks", {site.stack for site in left if site.stack}),
        ("kinds", {site.kind for site in left if site.kind}),
        ("experts", {str(site.expert) for site in left if site.expert is not None}),
        ("roles", {site.role for site in left}),
    ):
        if values:
            facts.append(f"{name} {', '.join(sorted(values))}")
    return "; ".join(facts)


def _no_path(sites: Sites, chosen: Where) -> str:
    inner = sites.select(chosen.inner)
    if not inner:
        return _reason(sites, chosen.inner)
    shown = ", ".join(dict.fromkeys(site.path for site in inner[:6]))
    return (
        f"where(path={quoted(chosen.path)}) removed all {len(inner)} sites of {chosen.inner} "
        f"(the whole path must match); their paths: {shown}"
    )


def _no_filter(sites: Sites, chosen: Selector) -> str:
    if isinstance(chosen, Layers):
        return (
            f"{chosen} lies beyond the model, which has layers 0 to {sites.layers - 1}"
            if sites.layers
            else (f"{chosen} selects nothing: no layers were found")
        )
    known = {
        Stack: sorted({site.stack for site in sites if site.stack}),
        Kind: sorted({site.kind for site in sites if site.kind}),
        Expert: sorted({str(site.expert) for site in sites if site.expert is not None}),
    }.get(type(chosen), [])
    return f"{chosen} matches no site; the model has {', '.join(known) or 'none'}"


def _beyond(sites: Sites, chosen: Selector) -> str | None:
    for part in _flatten(chosen):
        if isinstance(part, Layers) and part.stop > sites.layers:
            return f"{part} reaches beyond the last layer, {sites.layers - 1}"
    return None


def _flatten(selector: Selector) -> Iterator[Selector]:
    yield selector
    for part in selector.parts():
        if not isinstance(selector, Not):
            yield from _flatten(part)


def _no_role(sites: Sites, chosen: Role) -> str:
    counts: dict[str, int] = {}
    for site in sites:
        counts[site.role] = counts.get(site.role, 0) + 1
    present = ", ".join(f"{role} ({count})" for role, count in counts.items()) or "none"
    text = f"no {chosen}: {_missing(sites, chosen)}"
    return f"{text}. Roles found: {present}"


def _missing(sites: Sites, chosen: Role) -> str:
    if chosen.name.startswith("attention"):
        return _attention_miss(sites, chosen)
    if chosen.name.startswith("ffn"):
        misses = [miss for miss in sites.misses if miss.role.startswith("ffn")]
        return JOIN_MISS + _closest(misses, "candidates")
    return "nothing of that structure is in the graph"


def _attention_miss(sites: Sites, chosen: Role) -> str:
    own = [miss for miss in sites.misses if miss.role == chosen.name and miss.role != "attention.core"]
    if own:
        return f"the closest is %{own[0].node}: {own[0].reason}"
    if any(site.role == "attention.core" for site in sites):
        return "there are attention cores, but nothing that plays this role at a residual add"
    misses = [miss for miss in sites.misses if miss.role.startswith("attention")]
    return SOFTMAX_MISS + _closest(misses, "softmaxes")


def _closest(misses: list[NearMiss], what: str) -> str:
    if not misses:
        return f"; no {what} seen"
    best = max(misses, key=lambda miss: miss.progress)
    noun = what if len(misses) != 1 else what.removesuffix("s").removesuffix("e") if what == "softmaxes" else what[:-1]
    return f"; {len(misses)} {noun} seen, closest: %{best.node}, {best.reason}"
