"""Graphs as Python functions."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

from torch import fx

from peftgraph.ir.graphs import copy_graph
from peftgraph.runtime.direct_calls import call_directly

Code = Callable[..., list[Any]]


def compile_graph(graph: fx.Graph, title: str, known: dict[str, Code] | None = None) -> Code:
    """Return a Python function `(module, *inputs) -> list of output leaves` for `graph`.

    Args:
        graph: the graph that it runs; unchanged.
        title: the name of its file in tracebacks.
        known: functions by their source; graphs with the same source share one.
    """
    graph = copy_graph(graph)
    call_directly(graph)
    source = graph.python_code("self")
    key = f"{sorted((name, id(value)) for name, value in source.globals.items())}\n{source.src}"
    if known is not None and key in known:
        return known[key]
    filename = f"<peftgraph {title} {id(source):x}>"
    scope: dict[str, Any] = dict(source.globals)
    exec(compile(source.src, filename, "exec"), scope)
    linecache.cache[filename] = (len(source.src), None, source.src.splitlines(keepends=True), filename)
    if known is not None:
        known[key] = scope["forward"]
    return scope["forward"]
