"""Prints the quickstart's steps: tables on stdout, live progress on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from peftgraph.terminal.console import ERR, OUT
from peftgraph.terminal.diffs import coloured, first_layer_diff
from peftgraph.terminal.tables import OutlineTable, count_table

if TYPE_CHECKING:
    import peftgraph as pg
    from peftgraph.demo.training import Curve


def heading(text: str) -> None:
    """Print a heading."""
    OUT.print()
    OUT.print(Rule(f"[bold]{text}[/]", align="left", style="dim"))


def dataset(data: Mapping[str, Any]) -> None:
    """Print how many sentences with a slip of each kind are in each part, and how many were dropped, and why."""
    heading("1  The data: sentences of documentation with one slip in each; which word is it?")
    table = _table("slip", *(f"{part}>" for part in data["sentences"]))
    for kind, numbers in data["per_kind"].items():
        table.add_row(kind, *map(str, numbers.values()))
    table.add_row("[bold]sentences[/]", *(f"[bold]{number}[/]" for number in data["sentences"].values()))
    table.add_row("[dim]from modules[/]", *(f"[dim]{number}[/]" for number in data["modules"].values()))
    OUT.print(table)
    OUT.print("No module gives sentences to two parts, and no two sentences are near copies.", style="dim")
    dropped = ", ".join(
        f"{number:,} {reason}" for reason, number in sorted(data["dropped"].items(), key=lambda item: -item[1])
    )
    OUT.print(f"Left out: {dropped}.", style="dim", highlight=False)


def program(base: pg.Program, tuned: pg.Program) -> None:
    """Print the sites, the diff of one layer, and the counts of parameters."""
    from peftgraph.draw import outline

    heading("2  The model: its sites, found by structure")
    OUT.print(OutlineTable(outline(base, base.sites)))
    heading("3  The recipe: what it does to the first layer")
    OUT.print(coloured(first_layer_diff(tuned, base)), no_wrap=True, overflow="ellipsis")
    OUT.print(count_table(tuned.count()))


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr; yield a function to call with the amount of work done."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        console=ERR,
        transient=True,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def training(steps: int, frozen: float) -> Iterator[Callable[[Curve], None]]:
    """Show a live bar with the loss, the validation accuracy and the frozen head's; yield the function that updates
    it."""
    heading("4  Training")
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn(
            "loss [cyan]{task.fields[loss]:.3f}[/]  validation [green]{task.fields[now]:.1%}[/] "
            "(frozen head {task.fields[frozen]:.1%})"
        ),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR) as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"), now=0.0, frozen=frozen)

        def live(curve: Curve) -> None:
            recent = [loss for _, loss in curve.losses[-20:]]
            bar.update(
                task,
                completed=len(curve.losses),
                loss=sum(recent) / len(recent),
                now=curve.validations[-1][1] if curve.validations else 0.0,
            )

        yield live


def accuracies(found: Mapping[str, Any]) -> None:
    """Print the test accuracies of a guess, the frozen head and the tuned proof-reader."""
    table = _table("on the test part", "accuracy>", "validation>", "")
    table.add_row("any word, by chance", f"{found['chance']:.1%}", "", "")
    table.add_row(
        "linear head, frozen encoder",
        f"{found['frozen']:.1%}",
        f"{found['frozen_validation']:.1%}",
        f"[dim]same data, to convergence, decay {found['frozen_decay']:g} chosen on validation[/]",
    )
    note = "[dim]after the last step, nothing chosen[/]"
    table.add_row(
        "[bold]tuned by the recipe[/]",
        f"[bold green]{found['tuned']:.1%}[/]",
        f"{found['tuned_validation']:.1%}",
        note,
    )
    for kind, frozen, tuned, count in found["per_kind"]:
        table.add_row(f"[dim]  {kind}[/]", f"[dim]{frozen:.0%} to {tuned:.0%}[/]", "", f"[dim]of {count} sentences[/]")
    OUT.print(table)
    OUT.print(verdict(found), style="dim", highlight=False)


def sentences(examples: Sequence[Mapping[str, Any]], shown: int = 6) -> None:
    """Print some test sentences, with the word that the tuned proof-reader points at."""
    OUT.print()
    for row in examples[:shown]:
        line = Text("  ")
        for i, word in enumerate(row["words"]):
            right = row["place"] == row["tuned"]
            style = ("bold green underline" if right else "bold red underline") if i == row["tuned"] else ""
            line.append(word, "green" if i == row["place"] and not right else style)
            line.append(" ")
        line.append(f" meant: {row['meant']}", "dim")
        OUT.print(line, highlight=False)
    OUT.print("Underlined: what the tuned model points at; green: where the slip is.", style="dim", highlight=False)


def verdict(found: Mapping[str, Any]) -> str:
    """Describe the difference to the frozen head and its significance, in one sentence."""
    difference = 100 * (found["tuned"] - found["frozen"])
    wins, losses = found["only_tuned_right"], found["only_frozen_right"]
    return (
        f"{difference:+.1f} points over the frozen head: of {found['tests']} test sentences, {wins} are right only "
        f"after tuning and {losses} only before (McNemar's exact test, p = {found['p']:.2g})."
    )


def proof(lines: Sequence[str]) -> None:
    """Print the evidence of the fold."""
    heading("5  Folding: nothing of the recipe is left, and this is the proof")
    OUT.print(Padding("\n".join(lines), (0, 2)), highlight=False, markup=False)


def latency(found: Sequence[Mapping[str, Any]], threads: int) -> None:
    """Print the medians and their ratios to the base."""
    heading("6  Latency: what the adapter costs, and what is left after folding")
    table = _table("batch", "tokens>", *(f"{name}>" for name in found[0]["ratio"]), "base, ms>")
    for row in found:
        table.add_row(
            str(row["batch"]),
            str(row["tokens"]),
            *(ratio_text(row["ratio"][name]) for name in row["ratio"]),
            f"{row['milliseconds']['base']:.1f}",
        )
    OUT.print(table)
    OUT.print(
        f"Ratios of medians to the base (in brackets the middle half of the rounds), {threads} threads, one process.",
        style="dim",
        highlight=False,
    )


def ratio_text(ratio: Sequence[float]) -> str:
    """Format a ratio with the quartiles of the rounds."""
    middle, low, high = ratio
    return "1" if low == high == 1 else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def exports(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the written files and how their outputs compare."""
    heading("7  Files that run without peftgraph")
    for name, facts in found.items():
        OUT.print(f"  [bold]{name}[/]  {export_line(facts)}", highlight=False)


def export_line(facts: Mapping[str, Any]) -> str:
    """Describe one exported file and how its outputs compare."""
    if "accuracy" in facts:
        same = f"{facts['same_predictions']:.1%} of the predictions unchanged"
        return f"read back by AutoModel: {facts['accuracy']:.1%} on the test part, {same}"
    size = f"{facts['bytes'] / 1e6:.0f} MB"
    if "torch" in facts:
        where = f"torch {facts['torch']} in a fresh Python where peftgraph cannot be imported"
        return f"{size}, run by {where}: relative difference {facts['error']:.1e}"
    if "onnxruntime" in facts:
        return f"{size}, run by onnxruntime {facts['onnxruntime']}: relative difference {facts['error']:.1e}"
    return f"{size}, {facts['note']}"


def closing(out: Path, seconds: float) -> None:
    """Print where the report is."""
    OUT.print()
    OUT.print(f"{seconds:.0f} s in all. Open [bold]{out / 'report.html'}[/] in a browser.", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(header_style="dim", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left")
    return table
