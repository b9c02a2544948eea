"""Reads prompts of the `adapters` library as passes: rows after the embedding layer, which its models also return.

Where no table embeds tokens, in ViT and BEiT, the embeddings are those of patches, which are no site: the block that
reads them first is used instead.

Source: adapter-hub/adapters 1.3, methods/prompt_tuning.py.
"""

from __future__ import annotations

from typing import Literal

from peftgraph.errors import AdapterError
from peftgraph.interop.adapterhub.saved_adapter import TENSORS, SavedAdapter
from peftgraph.interop.parameter_names import PROMPT_ROWS
from peftgraph.interop.site_selection import selector_for
from peftgraph.ir.program import ProgramData
from peftgraph.passes import Prompt
from peftgraph.rewrite.match import match_all
from peftgraph.rewrite.method import PassWithValues
from peftgraph.rewrite.sequence.before_first_block import is_first_block_without_embedding
from peftgraph.sites import Site, Sites

POSITIONS: dict[str, Literal["front", "after_first"]] = {"prefix": "front", "prefix_after_bos": "after_first"}


def prompt_pass(program: ProgramData, sites: Sites, saved: SavedAdapter) -> PassWithValues:
    """Return the pass of a prompt.

    Raises:
        AdapterError: the rows are of another width than the embedded tokens, or at a position where no pass puts them.
    """
    (tensors,) = saved.at("prompt_tunings").values()
    named = saved.named("prompt_tuning", tensors, {"prompt_embedding.weight": PROMPT_ROWS})
    if PROMPT_ROWS not in named:
        raise AdapterError(f"{saved.directory / TENSORS} lacks prompt_embedding.weight.")
    length, width = named[PROMPT_ROWS].shape
    place = saved.option("combine", str)
    if place not in POSITIONS:
        raise saved.refuse(f"combine={place!r}")
    of_tokens = bool(sites.select("embedding"))
    found = _tokens(program, sites, width) if of_tokens else _pictures(program, sites, width)
    if found is None:
        what = "embedding of tokens" if of_tokens else "first block"
        raise AdapterError(f"{saved.directory} is a prompt of width {width}, which no {what} here has.")
    at = selector_for(sites, [found])
    method = Prompt(at=at, length=length, onto="embeddings", place=POSITIONS[place], returns="all")
    return PassWithValues(method, {(found.id, PROMPT_ROWS): named[PROMPT_ROWS]})


def _tokens(program: ProgramData, sites: Sites, width: int) -> Site | None:
    """Return the largest embedding table, which is the tokens'; None where its width is another."""
    weights = program.table.tensors()
    tables = {site: site.weight.shape(weights) for site in sites.select("embedding") if site.weight is not None}
    found = max(tables, key=lambda site: tables[site][1], default=None)
    return None if found is None or tables[found][0] != width else found


def _pictures(program: ProgramData, sites: Sites, width: int) -> Site | None:
    """Return the block that reads the embedded patches first; None where its width is another."""
    starts = (one for one in match_all(program, sites, sites.select("block")) if is_first_block_without_embedding(one))
    return next((one.site for one in starts if one.features == width), None)
