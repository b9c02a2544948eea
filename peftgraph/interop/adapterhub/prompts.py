"""Prompts of the `adapters` library as passes: rows behind the finished embeddings, which its models give out as well.

Where no table embeds tokens, in ViT and BEiT, the embeddings are those of patches, and no site: the block that reads
them first stands for them.

Source: adapter-hub/adapters 1.3, methods/prompt_tuning.py.
"""

from __future__ import annotations

from typing import Any, cast

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved import TENSORS, Saved
from peftgraph.interop.filling import Filled
from peftgraph.interop.selecting import selector_of
from peftgraph.ir.program import ProgramData
from peftgraph.rewrite.match import match_all
from peftgraph.rewrite.registry import find_pass
from peftgraph.rewrite.sequence.before_first_block import is_first_block_without_embedding
from peftgraph.sites import Site, Sites

PLACES = {"prefix": "front", "prefix_after_bos": "after_first"}


def prompt(program: ProgramData, sites: Sites, saved: Saved) -> Filled:
    """The pass of a prompt.

    Raises:
        AdapterError: the rows are of another width than the embedded tokens, or stand where no pass puts them.
    """
    (tensors,) = saved.at("prompt_tunings").values()
    named = saved.named("prompt_tuning", tensors, {"prompt_embedding.weight": "prompt"})
    if "prompt" not in named:
        raise AdapterError(f"{saved.directory / TENSORS} lacks prompt_embedding.weight.")
    length, width = named["prompt"].shape
    place = saved.option("combine", str)
    if place not in PLACES:
        raise saved.refuse(f"combine={place!r}")
    of_tokens = bool(sites.select("embedding"))
    found = _tokens(program, sites, width) if of_tokens else _pictures(program, sites, width)
    if found is None:
        what = "embedding of tokens" if of_tokens else "first block"
        raise AdapterError(f"{saved.directory} is a prompt of width {width}, which no {what} here has.")
    method = cast(Any, find_pass("prompt"))(
        at=selector_of(sites, [found]), length=length, onto="embeddings", place=PLACES[place], returns="all"
    )
    return Filled(method, {(found.id, "prompt"): named["prompt"]})


def _tokens(program: ProgramData, sites: Sites, width: int) -> Site | None:
    """The embedding of tokens, of which there are most."""
    weights = program.table.tensors()
    tables = {site: site.weight.shape(weights) for site in sites.select("embedding") if site.weight is not None}
    found = max(tables, key=lambda site: tables[site][1], default=None)
    return None if found is None or tables[found][0] != width else found


def _pictures(program: ProgramData, sites: Sites, width: int) -> Site | None:
    """The block that reads the embedded patches first."""
    starts = (one for one in match_all(program, sites, sites.select("block")) if is_first_block_without_embedding(one))
    return next((one.site for one in starts if one.features == width), None)
