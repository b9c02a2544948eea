"""Why a selector finds nothing: which part never matched, what there is instead, and the nearest miss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from peftgraph.errors import Ambiguous, NoMatch, PeftGraphWarning, warn
from peftgraph.ir.graphs import call_nodes
from peftgraph.sites.dataflow import ops
from peftgraph.sites.explanations.evidence import cuts
from peftgraph.sites.explanations.explanation import Explanation, Reasons, nearest, reasons_for
from peftgraph.sites.explanations.near_misses import mixing
from peftgraph.sites.explanations.patterns import explain_pattern
from peftgraph.sites.found import FoundSites
from peftgraph.sites.origin import Origin
from peftgraph.sites.patterns.pattern import PatternRole
from peftgraph.sites.roles import absent
from peftgraph.sites.selectors.filters import Expert, Kind, Layers, Stack
from peftgraph.sites.selectors.selector import Both, Either, Not, RoleSelector, Selector, Where, as_selector, quoted
from peftgraph.sites.site import Site

MOST_IN_FULL = 4  # of more sites, the first of each role is explained
NO_GRAPH = "the graph it was found in is not at hand"


def require(sites: FoundSites, selector: object) -> tuple[Site, ...]:
    """Return the matches. An alternative of the selector that matches nothing beside others that do is a
    PeftGraphWarning.

    Raises:
        NoMatch: there are none, or a number of layers lies beyond the model.
        Ambiguous: a layer number means a layer in several stacks, and the selector names none.
    """
    chosen = as_selector(selector)
    found = sites.select(chosen)
    if not found:
        raise NoMatch(_problem(sites, chosen))
    idle = [part for part in _alternatives(chosen) if not sites.select(part)]
    if idle:
        reasons = "\n".join(_problem(sites, part) for part in idle)
        warn(f"part of {chosen} never matched:\n{reasons}", PeftGraphWarning)
    beyond = _beyond(sites, chosen)
    if beyond:
        raise NoMatch(f"{chosen}: {beyond}")
    _refuse_ambiguous(chosen, found)
    return found


def _refuse_ambiguous(chosen: Selector, found: tuple[Site, ...]) -> None:
    for part in _alternatives(chosen):
        parts = list(_flatten(part))
        numbers = next((one for one in parts if isinstance(one, Layers)), None)
        named = any(isinstance(one, Stack) or (isinstance(one, Where) and one.path is not None) for one in parts)
        stacks = sorted({site.stack for site in found if site.stack and site.layer is not None and part.matches(site)})
        if numbers is not None and len(stacks) > 1 and not named:
            each = "|".join(f"stack({quoted(name)})" for name in stacks)
            raise Ambiguous(
                f"{chosen}: {numbers} is ambiguous, {' and '.join(stacks)} each number their layers from 0. "
                f"Add &stack({quoted(stacks[0])}) for one of them, or &({each}) for all."
            )


def explain(sites: FoundSites, selector: object) -> Explanation:
    """Why the matches are sites; or what killed the match and where it got furthest."""
    chosen = as_selector(selector)
    found = sites.select(chosen)
    if not found:
        return Explanation(str(chosen), problem=_problem(sites, chosen))
    full = found if len(found) <= MOST_IN_FULL else tuple({site.role: site for site in reversed(found)}.values())[::-1]
    others = tuple(site.id for site in found if site not in full)
    if sites.origin is None:
        return Explanation(str(chosen), tuple(Reasons(site, (NO_GRAPH,), ()) for site in full), others)
    return Explanation(str(chosen), tuple(reasons_for(sites.origin, site) for site in full), others)


def _problem(sites: FoundSites, chosen: Selector) -> str:
    """Why nothing matches, in a headline and indented lines."""
    where = "" if sites.origin is None else f" in {sum(1 for _ in call_nodes(sites.origin.graph))} nodes"
    return f"{chosen}: 0 sites{where}\n{_indented(_reason(sites, chosen))}"


def _indented(text: str) -> str:
    return "\n".join(line if line.startswith("    ") else f"    {line}" for line in text.splitlines())


def _reason(sites: FoundSites, chosen: Selector) -> str:
    if isinstance(chosen, PatternRole):
        return explain_pattern(sites, chosen)
    if isinstance(chosen, Either):
        return "\n".join(_indented(f"{part}: {_reason(sites, part)}") for part in _alternatives(chosen))
    if isinstance(chosen, Both):
        return _no_overlap(sites, chosen)
    if isinstance(chosen, Where):
        return _no_path(sites, chosen)
    if isinstance(chosen, RoleSelector):
        return _no_role(sites, chosen)
    if isinstance(chosen, Not):
        return f"every site matches {chosen.inner}"
    return _no_filter(sites, chosen)


def _alternatives(selector: Selector) -> Iterator[Selector]:
    """Yield the alternatives of a selector, with the filters that stand around them."""
    if isinstance(selector, Either):
        yield from _alternatives(selector.left)
        yield from _alternatives(selector.right)
    elif isinstance(selector, Both):
        for left in _alternatives(selector.left):
            for right in _alternatives(selector.right):
                yield Both(left, right)
    elif isinstance(selector, Where):
        for inner in _alternatives(selector.inner):
            yield replace(selector, inner=inner)
    else:
        yield selector


def _conjuncts(selector: Selector) -> list[Selector]:
    if isinstance(selector, Both):
        return [*_conjuncts(selector.left), *_conjuncts(selector.right)]
    return [selector]


def _no_overlap(sites: FoundSites, chosen: Both) -> str:
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
    """Return what the filters could have asked for."""
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


def _no_path(sites: FoundSites, chosen: Where) -> str:
    inner = sites.select(chosen.inner)
    if not inner:
        return _reason(sites, chosen.inner)
    removed = f"{chosen.condition} removed all {len(inner)} sites of {chosen.inner}"
    if chosen.path is not None and not any(
        replace(chosen, shape=None, out_features=None, in_features=None).matches(site) for site in inner
    ):
        shown = ", ".join(dict.fromkeys(site.path for site in inner[:6]))
        return f"{removed} (the whole path must match); their paths: {shown}"
    shapes = dict.fromkeys(" x ".join(map(str, site.shape)) for site in inner if site.shape)
    return f"{removed}; their shapes (out x in): {', '.join(list(shapes)[:6]) or 'none'}"


def _no_filter(sites: FoundSites, chosen: Selector) -> str:
    if isinstance(chosen, Layers):
        if not sites.layers:
            return f"{chosen} selects nothing: no layers were found"
        how = [] if sites.origin is None else map(sites.origin.say, cuts(sites.origin.structure))
        return "\n".join([f"{chosen} is beyond the model, which has layers 0 to {sites.layers - 1}", *how])
    known = {
        Stack: sorted({site.stack for site in sites if site.stack}),
        Kind: sorted({site.kind for site in sites if site.kind}),
        Expert: sorted({str(site.expert) for site in sites if site.expert is not None}),
    }.get(type(chosen), [])
    return f"{chosen} matches no site; the model has {', '.join(known) or 'none'}"


def _beyond(sites: FoundSites, chosen: Selector) -> str | None:
    for part in _flatten(chosen):
        if not isinstance(part, Layers):
            continue
        if max(part.start, part.stop or 0) > sites.layers:
            return f"{part} reaches beyond the last layer, {sites.layers - 1}"
        if min(part.start, part.stop or 0) < -sites.layers:
            return f"{part} reaches beyond the first layer, {-sites.layers} from the end"
    return None


def _flatten(selector: Selector) -> Iterator[Selector]:
    yield selector
    for part in selector.parts():
        if not isinstance(selector, Not):
            yield from _flatten(part)


def _no_role(sites: FoundSites, chosen: RoleSelector) -> str:
    """Return the nearest miss of a role that nothing plays, and the roles there are."""
    counts = Counter(site.role for site in sites)
    present = ", ".join(f"{role} ({count})" for role, count in counts.items()) or "none"
    near = (
        [] if sites.origin is None else nearest(sites.origin, chosen.name) or [f"    {_absent(sites.origin, chosen)}"]
    )
    return "\n".join([f"nothing plays {chosen.name}", *near, f"    roles found: {present}"])


def _absent(origin: Origin, chosen: RoleSelector) -> str:
    """Return what a graph lacks that holds nothing near a role."""
    reason, family = absent(chosen.name), chosen.name.partition(".")[0]
    if family == "attention" and (mixed := mixing(origin.structure)):
        shown = ", ".join(f"%{node.name} ({ops.name(node)})" for node in mixed[:3])
        return origin.say(f"{reason}; what mixes positions is {shown}{', ...' if len(mixed) > 3 else ''}")
    return reason
