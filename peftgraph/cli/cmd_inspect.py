"""`peftgraph inspect`: shows the parts of a model, found by structure, without its weights."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftgraph.cli.caching import caching
from peftgraph.cli.options import Json
from peftgraph.model_folders.loading import check_source, skeleton, trace
from peftgraph.terminal.console import RESULT, emit, say

if TYPE_CHECKING:
    import peftgraph as pg
    from peftgraph.sites.explanations.explanation import Explanation

Source = Annotated[Path, typer.Argument(metavar="DIR", help="A local transformers folder, or a config.json alone.")]


def inspect(
    ctx: typer.Context,
    source: Source,
    explain: Annotated[
        str, typer.Option("--explain", metavar="SELECTOR", help="Why these are sites; or what comes closest to one.")
    ] = "",
    layer: Annotated[int | None, typer.Option("--layer", help="With --explain: one layer; -1 is the last.")] = None,
    at: Annotated[
        str,
        typer.Option("--at", metavar="SELECTOR", help="Only these sites, e.g. 'attention.q & layers(0, 3)'."),
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Every site on a row of its own.")] = False,
    as_json: Json = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page that draws the blocks.")
    ] = None,
) -> None:
    """Show what a model is made of, and so what a recipe can be put on. No weights are loaded."""
    if layer is not None and not explain:
        raise typer.BadParameter("--layer narrows --explain; with --at write 'SELECTOR & layers(N)'")
    from peftgraph.sites.selector_parser import parse_selector

    check_source(source)
    for selector in filter(None, (explain, at)):
        parse_selector(selector)
    start = time.perf_counter()
    program = trace(skeleton(source), cache=caching(ctx))
    if explain:
        found = program.with_patterns(explain).sites.explain(explain, layer=layer)
        if as_json:
            emit(explanation_document(found))
        else:
            typer.echo(str(found))
        return
    if at:
        program = program.with_patterns(at)
    sites = program.sites.require(at) if at else tuple(program.sites)
    seconds = time.perf_counter() - start
    if html is not None:
        write_page(program, html, seconds)
    if as_json:
        emit(as_document(program, sites))
        return
    show(program, sites, at != "", every)
    nodes = len(program.graph.nodes)
    say(f"traced in {seconds:.1f} s: {nodes} nodes; inputs: {program.signature.describe()}", "dim")
    if html is not None:
        say(f"page written to {html}", "bold")


def show(program: pg.Program, sites: tuple[pg.Site, ...], chosen: bool, every: bool) -> None:
    """Print the table of the model, or of the chosen sites, and the number of sites of each role."""
    from peftgraph.draw import outline
    from peftgraph.terminal.tables import OutlineTable, listing

    RESULT.print(listing(sites, every) if chosen or every else OutlineTable(outline(program, program.sites)))
    roles = Counter(site.role for site in sites)
    say(f"{len(sites)} sites: " + ", ".join(f"{number} {role}" for role, number in sorted(roles.items())))


def write_page(program: pg.Program, path: Path, seconds: float) -> None:
    """Write the page of a model; an interrupted write leaves no partial file."""
    import peftgraph as pg
    from peftgraph.utils.atomic_files import atomic_file

    text = program.html(f"Drawn by peftgraph {pg.__version__} from the structure alone, in {seconds:.1f} s.")
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def explanation_document(found: Explanation) -> dict[str, Any]:
    """Return an explanation, for --json."""
    return {
        "selector": found.selector,
        "reasons": [{"site": one.site.id, "steps": one.steps, "excerpt": one.excerpt} for one in found.reasons],
        "others": found.others,
        "problem": found.problem,
    }


def as_document(program: pg.Program, sites: tuple[pg.Site, ...]) -> dict[str, Any]:
    """Return what `inspect` found, as JSON."""
    from peftgraph.terminal.tables import layout

    return {
        "model": program.model,
        "parameters": program.count().total,
        "nodes": len(program.graph.nodes),
        "layers": program.sites.layers,
        "layout": layout(program.sites),
        "inputs": [
            {"name": spec.name, "dtype": str(spec.dtype), "dims": list(spec.dims)} for spec in program.signature.inputs
        ],
        "counts": dict(sorted(Counter(site.role for site in sites).items())),
        "sites": [_site(site) for site in sites],
        "unmatched": [
            {"id": one.site.id, "closest": one.closest, "reason": one.reason} for one in program.sites.unmatched
        ],
    }


def _site(site: pg.Site) -> dict[str, Any]:
    return {
        "id": site.id,
        "role": site.role,
        "path": site.path,
        "layer": site.layer,
        "stack": site.stack,
        "kind": site.kind,
        "columns": None if site.columns is None else [list(run) for run in site.columns.runs],
        "expert": site.expert,
        "experts": None if site.weight is None else site.weight.experts,
        "heads": site.heads,
        "head_dim": site.head_dim,
        "layout": site.layout,
        "parallel": site.parallel,
        "shape": None if site.shape is None else list(site.shape),
        "weight": None if site.weight is None else site.weight.parameter,
        "bias": None if site.bias is None else site.bias.parameter,
    }
