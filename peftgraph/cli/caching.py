"""Whether a command may use earlier traces: yes, unless `peftgraph --no-cache` was called."""

from __future__ import annotations

import typer


def caching(ctx: typer.Context) -> bool:
    """Tell whether earlier traces may be used, and this one kept."""
    return ctx.obj is not True
