"""Renders the report of an experiment: one self-contained HTML file, made from the metrics alone; and the curves."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from peftgraph.experiments.curves import STYLE, curve
from peftgraph.utils.atomic_files import atomic_file


def write_report(metrics: Mapping[str, Any], out: Path) -> None:
    """Write report.html, and the curves as files of their own."""
    texts = {
        "report.html": render(metrics),
        "loss.svg": _losses(metrics, True),
        "evaluation.svg": _checks(metrics, True),
    }
    for name, text in texts.items():
        if text:
            with atomic_file(out / name) as path:
                path.write_text(text, encoding="utf-8")


def render(metrics: Mapping[str, Any]) -> str:
    """Return the report as HTML."""
    template = files("peftgraph.experiments").joinpath("report.html").read_text(encoding="utf-8")
    m = metrics
    drawn = [("Training loss", _losses(m, False)), (f"Evaluation: {m['metric']}", _checks(m, False))]
    return Template(template).substitute(
        style=STYLE,
        title=escape(f"{Path(m['settings']['model']).name}: {m['task']}"),
        lead=escape(_lead(m)),
        cards="".join(
            f'<div class="card {css}"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
            for css, big, small in _cards(m)
        ),
        curves="".join(f"<section><h2>{escape(name)}</h2>{drawing}</section>" for name, drawing in drawn if drawing),
        labels=_labels(m),
        recipe=escape("\n".join(m["recipe"])),
        settings="".join(
            f"<tr><td>{escape(name)}</td><td>{escape(_plain(value))}</td></tr>" for name, value in m["settings"].items()
        ),
    )


def value_text(metrics: Mapping[str, Any], value: float) -> str:
    """Format a value of the metric: a share in percent."""
    return f"{value:.1%}" if metrics["rising"] else f"{value:.3f}"


def _lead(m: Mapping[str, Any]) -> str:
    rows = m["rows"]
    cut = f" {m['cut']} texts were longer than {m['settings']['length']} tokens and are cut." if m["cut"] else ""
    told = f"{rows['train']:,} rows to train on, {rows['evaluation']:,} to evaluate on; {m['steps']:,} steps.{cut}"
    return f"{told} The merged model: {m['merged']}."


def _cards(m: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    count = m["count"]
    cards: list[tuple[str, str, str]] = []
    if m["checks"]:
        cards.append(
            ("main", value_text(m, m["checks"][-1][1]), f"{m['metric']} on the evaluation part, after the last step")
        )
        if m["checks"][0][0] == 0:
            cards.append(("", value_text(m, m["checks"][0][1]), "before training"))
    cards.append(
        ("", f"{count['trainable']:,}", f"trainable values, {count['trainable'] / count['total']:.2%} of the model")
    )
    cards.append(("", f"{m['seconds']:.0f} s", "from start to finish"))
    return cards


def _losses(m: Mapping[str, Any], standalone: bool) -> str:
    return curve(m["losses"], "training loss over steps", standalone=standalone) if m["losses"] else ""


def _checks(m: Mapping[str, Any], standalone: bool) -> str:
    return curve(m["checks"], f"{m['metric']} over steps", checks=True, standalone=standalone) if m["checks"] else ""


def _labels(m: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count}</td><td class="n">{hits}</td>'
        f'<td class="n">{f"{hits / count:.0%}" if count else ""}</td></tr>'
        for name, count, hits in m.get("labels") or []
    )
    head = '<tr><th>label</th><th class="n">rows</th><th class="n">right</th><th class="n">share</th></tr>'
    return f"<section><h2>By label, on the evaluation part</h2><table>{head}{rows}</table></section>" if rows else ""


def _plain(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
