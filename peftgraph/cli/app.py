"""Defines the typer application: global options, commands, and how errors become exit codes.

Exit codes: 0 done; 1 something the user can fix (one line on stderr says what); 2 wrong usage; 3 a bug in peftgraph.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftgraph.cli import (
    cmd_apply,
    cmd_cache,
    cmd_compare,
    cmd_completion,
    cmd_doctor,
    cmd_draw,
    cmd_export,
    cmd_inspect,
    cmd_merge,
    cmd_quantise,
    cmd_quickstart,
    cmd_sweep,
    cmd_train,
)
from peftgraph.cli.wording import in_options
from peftgraph.errors import PeftGraphError
from peftgraph.terminal.console import ERR

USER_ERROR, BUG = 1, 3


class GuardedCommands(TyperGroup):
    """Turns an error of a command into one line on stderr and an exit code; `--debug` adds the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (PeftGraphError, OSError) as error:
            _show(in_options(str(error)), ctx.params.get("debug", False))
            raise typer.Exit(USER_ERROR) from error
        except Exception as bug:
            if isinstance(bug, typer.Exit | typer.Abort) or hasattr(bug, "exit_code"):
                raise  # typer's own: usage errors among them
            _show(f"this is a bug in peftgraph: {type(bug).__name__}: {bug}", ctx.params.get("debug", False))
            raise typer.Exit(BUG) from bug


def _show(message: str, debug: bool) -> None:
    if debug:
        ERR.print_exception(show_locals=False)
    ERR.print(f"error: {message}", style="red", soft_wrap=True)
    if not debug:
        ERR.print("(peftgraph --debug ... shows the traceback)", style="dim", soft_wrap=True)


app = typer.Typer(
    cls=GuardedCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help shows texts as they are written, brackets included
    context_settings={"max_content_width": 100},
    help="A compiler for parameter-efficient fine-tuning: find the sites, apply a recipe, fold, prove, export.",
    epilog="Exit codes: 0 done, 1 a user's error, 2 wrong usage, 3 a bug. Nothing is ever downloaded.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"peftgraph {version('peftgraph')}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Trace anew, and keep nothing (see: peftgraph cache).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Set the options that all commands share."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    ctx.obj = no_cache
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


app.command("inspect")(cmd_inspect.inspect)
app.command("apply")(cmd_apply.apply)
app.command("draw")(cmd_draw.draw)
app.command("compare")(cmd_compare.compare)
app.command("train")(cmd_train.train)
app.command("sweep")(cmd_sweep.sweep)
app.command("merge")(cmd_merge.merge)
app.command("quantise")(cmd_quantise.quantise)
app.command("export")(cmd_export.export)
app.command("cache")(cmd_cache.cache)
app.command("doctor")(cmd_doctor.doctor)
app.command("completion")(cmd_completion.completion)
app.command("quickstart")(cmd_quickstart.quickstart)
