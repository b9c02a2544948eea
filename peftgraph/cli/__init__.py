"""The command line. `peftgraph --help` lists the commands; each is one file that imports torch only when it runs."""

from __future__ import annotations


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a user's error, 2 wrong usage, 3 a bug."""
    from peftgraph.cli.app import app

    app(prog_name="peftgraph")
