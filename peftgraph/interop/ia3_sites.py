"""Compares the sites that a foreign (IA)3 adapter scales with those of the paper."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from peftgraph.sites import Site, Sites

PAPER = ("attention.k", "attention.v", "ffn.hidden")


def describe_departures(sites: Sites, directory: Path, outputs: Collection[Site], inputs: Collection[Site]) -> str:
    """Describe where an adapter departs from the paper, which scales keys, values and the feed-forward's hidden value.

    The linear branch of a gated unit may be scaled instead of its product: act(g) (l u) = l (act(g) u).

    Args:
        sites: of the model.
        directory: of the adapter.
        outputs: the sites whose outputs are scaled.
        inputs: the sites whose inputs are scaled.

    Returns:
        A warning; "" where it departs nowhere.
    """
    gated = {(site.stack, site.layer) for site in sites if site.role == "ffn.gate"}
    linear = [site for site in outputs if site.role == "ffn.up" and (site.stack, site.layer) in gated]
    scaled = ["ffn.hidden" if site in linear else site.role for site in outputs]
    departs = [f"the output of {role}" for role in scaled if role not in PAPER]
    departs += [f"the input of {site.role}" for site in inputs]
    departs += [f"no {role}" for role in PAPER if role not in scaled]
    if not departs:
        return ""
    return (
        f"{directory} scales {', '.join(dict.fromkeys(departs))}: it is loaded as it was trained, but the paper's "
        f"(IA)3 scales {', '.join(PAPER)} (arXiv 2205.05638, section 3.3)."
    )
