"""Renders the quickstart's report: one self-contained HTML file, made from the metrics alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from peftgraph.demo.charts import accuracy_chart, latency_chart, loss_chart, share_chart
from peftgraph.demo.terminal import export_line, ratio_text, verdict
from peftgraph.utils.atomic_files import atomic_file


def write_report(metrics: Mapping[str, Any], path: Path) -> None:
    """Write the report of a run; an interrupted write leaves no partial file."""
    page = render(metrics)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(metrics: Mapping[str, Any]) -> str:
    """Return the report of a run as HTML."""
    template = files("peftgraph.demo").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        **_opening(metrics),
        **_curves(metrics),
        **_structure(metrics),
        **_results(metrics),
        **_lists(metrics),
    }
    return Template(template).substitute(parts)


def _opening(m: Mapping[str, Any]) -> dict[str, str]:
    accuracy, count, data = m["accuracy"], m["count"], m["data"]
    sentences = sum(data["sentences"].values())
    cards = [
        (
            "main",
            f"{accuracy['tuned']:.1%}",
            f"of {accuracy['tests']} slips found, tuned and merged",
        ),
        ("", f"{accuracy['frozen']:.1%}", "a linear head on the frozen encoder"),
        ("", f"{accuracy['chance']:.1%}", "any word, by chance"),
        (
            "",
            f"{count['trainable']:,}",
            f"trainable values, {100 * count['trainable'] / count['total']:.2f} % of the encoder",
        ),
        (
            "",
            f"{m['latency'][0]['ratio']['merged'][0]:.2f}x",
            f"latency after folding, at batch 1 (adapted {m['latency'][0]['ratio']['adapted'][0]:.2f}x)",
        ),
        ("", f"{m['seconds']:.0f} s", f"from start to finish, {m['threads']} threads"),
    ]
    return {
        "title": f"{escape(m['model'])} learns proof-reading",
        "lead": (
            f"{sentences:,} sentences of the documentation inside the standard library, split by module, with one slip "
            "in each: a word missing, two words swapped, or a wrong word. Sentence vectors are trained for meaning, so "
            "a head on the frozen encoder hardly sees a slip; an adapter teaches the layers below to. "
            f"{escape(verdict(accuracy))}"
        ),
        "cards": "".join(
            f'<div class="card {kind}"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
            for kind, big, small in cards
        ),
        "footer": f"peftgraph quickstart, seed {m['seed']}, torch {escape(m['torch'])}; all numbers: metrics.json.",
    }


def _curves(m: Mapping[str, Any]) -> dict[str, str]:
    losses = [(float(step), loss) for step, loss in m["curve"]["losses"]]
    smooth = [(step, _mean([loss for _, loss in losses[max(0, i - 9) : i + 1]])) for i, (step, _) in enumerate(losses)]
    checks = [(float(step), value) for step, value in m["curve"]["validations"]]
    return {
        "loss": loss_chart(losses, smooth),
        "validation": accuracy_chart(checks, m["accuracy"]["frozen_validation"]),
    }


def _structure(m: Mapping[str, Any]) -> dict[str, str]:
    count = m["count"]
    found = {tuple(passes) for row in m["map"] for _, passes in row["sites"]}
    key = [f'<li><i class="{_kind(passes)}"></i>{escape(" and ".join(passes) or "frozen")}</li>' for passes in found]
    return {
        "map": "".join(map(_block_row, m["map"])),
        "mapkey": "".join(sorted(key)),
        "counts": (
            f"{count['trainable']:,} values train; folding rewrites {count['changed']:,} of the {count['total']:,} "
            "base values "
            f"({escape(count['ranks'])}) and leaves nothing added."
        ),
        "proof": escape("\n".join(m["proof"])),
        "recipe": escape("\n".join(m["recipe"])),
    }


def _kind(passes: Sequence[str]) -> str:
    """Return the CSS class of a site by the passes on it."""
    return "two" if len(passes) > 1 else "".join(passes) or "plain"


def _block_row(block: Mapping[str, Any]) -> str:
    """Render a block as a row of the map: one cell for each site, coloured by its passes."""
    cells = [
        f'<td class="{_kind(passes)}" title="{escape(role)}: {escape(", ".join(passes) or "frozen")}">'
        f"{escape(role.rpartition('.')[2])}</td>"
        for role, passes in block["sites"]
    ]
    return f"<tr><th>{escape(block['block'])}</th>{''.join(cells)}</tr>"


def _results(m: Mapping[str, Any]) -> dict[str, str]:
    accuracy = m["accuracy"]
    bars = []
    for row in m["latency"]:
        rows = [
            (name, ratio[0], f"{row['milliseconds'][name]:.1f} ms" if name == "base" else ratio_text(ratio))
            for name, ratio in row["ratio"].items()
        ]
        title = f'<p class="sub">batch {row["batch"]}, {row["tokens"]} tokens, medians of {row["rounds"]} rounds</p>'
        bars.append(title + latency_chart(rows, f"latency ratios at batch {row['batch']}"))
    return {
        "kinds": share_chart([(name, a, b) for name, a, b, _ in accuracy["per_kind"]], "slips found, by kind"),
        "distance": share_chart([(name, a, b) for name, a, b in accuracy["distance"]], "distance of the answers"),
        "latency": "".join(bars),
        "threads": str(m["threads"]),
    }


def _lists(m: Mapping[str, Any]) -> dict[str, str]:
    data = m["data"]
    dropped = sorted(data["dropped"].items(), key=lambda item: -item[1])
    rows = [[kind, *numbers.values()] for kind, numbers in data["per_kind"].items()]
    rows.append(["all", *data["sentences"].values()])
    rows.append(["modules", *data["modules"].values()])
    return {
        "exports": "".join(
            f"<tr><td><b>{escape(name)}</b></td><td>{escape(export_line(facts))}</td></tr>"
            for name, facts in m["exports"].items()
        ),
        "examples": "".join(map(_example, m["examples"])),
        "shown": str(len(m["examples"])),
        "data": (
            "No module gives sentences to two parts, and no two sentences of the corpus are near copies. Left out: "
            + escape(", ".join(f"{number:,} {reason}" for reason, number in dropped))
            + "."
        ),
        "partnames": "<th>slip</th>" + "".join(f'<th class="n">{escape(part)}</th>' for part in data["sentences"]),
        "partrows": "".join(
            f"<tr><td>{escape(str(row[0]))}</td>" + "".join(f'<td class="n">{cell}</td>' for cell in row[1:]) + "</tr>"
            for row in rows
        ),
    }


def _example(row: Mapping[str, Any]) -> str:
    """Render a sentence with the slip, what the tuned model and the frozen head point at, and what was meant."""
    words = []
    for i, word in enumerate(row["words"]):
        kinds = [
            kind for kind, place in (("slip", "place"), ("tuned", "tuned"), ("frozen", "frozen")) if row[place] == i
        ]
        words.append(f'<span class="{" ".join(kinds)}">{escape(word)}</span>' if kinds else escape(word))
    found = "yes" if row["tuned"] == row["place"] else "no"
    return (
        f'<li class="{found}"><p>{" ".join(words)}</p><small>{escape(row["kind"])}; '
        f"meant: <b>{escape(row['meant'])}</b> &middot; {escape(row['module'])} "
        f"&middot; {row['chance']:.0%} sure</small></li>"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
