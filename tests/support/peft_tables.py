"""The tables of docs/tutorials/peft-arguments.md; `python tests/support/peft_tables.py` writes them."""

from __future__ import annotations

from pathlib import Path

from peftgraph.rewrite.peft_options import COMMON, CONFIGS, Counterpart, PeftConfig
from peftgraph.rewrite.registry import find_pass

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "peft-arguments.md"
START = "## LoraConfig"


def tables() -> str:
    """Every configuration of peft with a counterpart, as a section with a table."""
    parts = [_section(one) for one in CONFIGS]
    return "\n\n".join([*parts, f"## What all configurations have\n\n{table(COMMON)}\n"])


def _section(one: PeftConfig) -> str:
    name = find_pass(one.word).__name__
    return f"## {one.name}\n\nThe pass is `{name}`, in recipes `{one.word}`.\n\n{table(one.options)}"


def table(options: tuple[Counterpart, ...]) -> str:
    """One configuration as a table."""
    named = [(one, f"`{one.option}`" if one.option else "") for one in options]
    rows = [f"| `{one.theirs}` | {option} | {escaped(one.meaning)} |" for one, option in named]
    return "\n".join(["| peft | option | what to write |", "|---|---|---|", *rows])


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("*", "\\*") if "`" not in text else text.replace("|", "\\|")


def main() -> None:
    """Write the tables behind the text of the page."""
    head = PAGE.read_text(encoding="utf-8").partition(START)[0]
    PAGE.write_text(head + tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
