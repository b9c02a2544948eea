"""Finds sites by the stored tensors they use, and builds selectors that match exactly a set of sites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from peftgraph.errors import AdapterError
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.weight_views import weight_view
from peftgraph.sites import Selector, Site, Sites
from peftgraph.sites.roles import ROLES
from peftgraph.sites.selectors.selector import RoleSelector


def sites_of_weight(sites: Sites, parameter: str) -> list[Site]:
    """Return the sites that multiply by a stored weight; several where it is fused, or used more than once."""
    roles = [one.name for one in ROLES if one.owns_weight]
    return [site for site in sites if site.weight and site.weight.parameter == parameter and site.role in roles]


def cover_all_features(found: Sequence[Site], features: int) -> bool:
    """Check whether the sites of one weight together own each of its output features, at every use."""
    by_use: dict[str, list[int]] = {}
    for site in found:
        view = weight_view(site)
        window = range(features) if view is None or view.window is None else view.window
        by_use.setdefault(site.op, []).extend(window)
    return bool(found) and all(sorted(columns) == list(range(features)) for columns in by_use.values())


def sites_adapted_at(program: ProgramData, sites: Sites, parameter: str, directory: Path) -> list[Site]:
    """Return the sites that own the features of a weight that an adapter's directory adapts as a whole.

    Raises:
        AdapterError: there are none, or they do not own all features.
    """
    found = sites_of_weight(sites, parameter)
    if not found:
        known = "is no weight of this model" if parameter not in program.table else "is no site"
        raise AdapterError(
            f"{directory} adapts {parameter.removesuffix('.weight')}, which {known}. program.sites lists the sites; "
            "program.sites.unmatched says why a projection is none."
        )
    stored = program.table[parameter].tensor
    view = weight_view(found[0])
    assert view is not None
    features = replace(view, window=None).shape(stored)[-2]
    if not cover_all_features(found, features):
        owned = ", ".join(f"{site.id} ({site.columns})" for site in found)
        raise AdapterError(
            f"{directory} adapts all {features} features of {parameter}, of which sites own only those of {owned}."
        )
    return found


def output_rows(site: Site) -> Any:
    """Return an index of the output features of a stored weight that a site owns."""
    view = weight_view(site)
    return slice(None) if view is None or view.window is None else view.window.index()


def selector_for(sites: Sites, chosen: Iterable[Site]) -> Selector:
    """Build a selector that matches `chosen` and nothing else: by role, narrowed by path where roles match more."""
    wanted = list(dict.fromkeys(chosen))
    wanted_roles = {site.role for site in wanted}
    roles = [RoleSelector(one.name) for one in ROLES if one.name in wanted_roles]
    anywhere: Selector = reduce(or_, roles)
    paths = list(dict.fromkeys(re.escape(site.path) for site in wanted))
    by_layer = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?=\\\.|$)", r"\\d+", path) for path in paths))
    # From the shortest to the longest: roles alone, paths with any layer number, paths, paths by role.
    candidates: list[Selector] = [anywhere, *(anywhere.where(path="|".join(some)) for some in (by_layer, paths))]
    one_by_one = [
        role.where(path="|".join(dict.fromkeys(re.escape(site.path) for site in wanted if site.role == role.name)))
        for role in roles
    ]
    candidates.append(reduce(or_, one_by_one))
    for one in candidates:
        if set(sites.select(one)) == set(wanted):
            return one
    raise AssertionError(f"no selector means {[site.id for site in wanted]} alone")
