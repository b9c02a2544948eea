"""A model as a page of its own: the drawing, its key, the table of layers and their text, which are linked and searched
by a small script. One file, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from peftgraph.draw.layer_table import Section, notes, sections
from peftgraph.draw.layer_text import LayerText
from peftgraph.draw.model_figure import distinct_blocks, model_figure
from peftgraph.draw.model_outline import Component, Outline, StackOutline
from peftgraph.draw.svg import style
from peftgraph.sites.roles import ROLES

KEY = {one.name: f"--{one.fill}" for one in ROLES if one.fill}


def page(outline: Outline, footer: str = "", texts: Sequence[LayerText] = ()) -> str:
    """Return the HTML page of a model.

    Args:
        outline: of the model.
        footer: a line at the end, such as how long tracing took.
        texts: of layers.
    """
    room = files("peftgraph.draw")
    template = room.joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        model=escape(outline.model),
        style=room.joinpath("page.css").read_text(encoding="utf-8") + style(),
        facts=escape(" · ".join(outline.facts())),
        figure=_figure(outline),
        layers=_layers(outline),
        texts="".join(_text(text, is_open=not place) for place, text in enumerate(texts)),
        unmatched=_unmatched(outline),
        script=room.joinpath("page.js").read_text(encoding="utf-8"),
        footer=escape(footer),
    )


def fragment(outline: Outline) -> str:
    """Return the drawing with its style, as HTML for a notebook."""
    drawing = model_figure(outline)
    return f"<style>{style()}</style>{drawing}" if drawing else f"<p>{escape(nothing(outline))}</p>"


def nothing(outline: Outline) -> str:
    """Return a sentence that says why there is nothing to draw."""
    why = "no residual stream with attention or a feed-forward on it was found, so there are no blocks to draw"
    return f"{outline.model}: {why}."


def _figure(outline: Outline) -> str:
    drawing = model_figure(outline)
    if not drawing:
        reasons = "".join(f"<pre>{escape(reason)}</pre>" for reason in outline.reasons)
        why = f"<p class='plain'>{escape(nothing(outline))}</p>{reasons}"
        return f"<section><h2>No blocks</h2>{why}</section>"
    return (
        f'<section><div class="scroll"><div class="center">{drawing}</div></div>{_key(outline)}{_strips(outline)}'
        "</section>"
    )


def _key(outline: Outline) -> str:
    present = {part.role for part in _components(outline)}
    items = "".join(f"<li>{_swatch(role)}{role}</li>" for role in KEY if role in present and role != "bias")
    return f'<ul class="key figure-colours">{items}</ul>'


def _components(outline: Outline) -> Iterable[Component]:
    for stack in outline.stacks:
        yield from (*stack.stem, *stack.tail)
        for group in stack.groups:
            yield from group.block.components


def _strips(outline: Outline) -> str:
    """Draw the order of the layers, for stacks with several kinds of blocks."""
    strips = "".join(_strip(stack) for stack in outline.stacks if len(distinct_blocks(stack)) > 1)
    return f'<div class="strips">{strips}</div>' if strips else ""


def _strip(stack: StackOutline) -> str:
    titles = {layer: (place, one.title) for place, one in enumerate(distinct_blocks(stack)) for layer in one.layers}
    cells = "".join(
        f'<span class="k{min(place, 3)}" title="layer {layer}: as {escape(title)}"></span>'
        for layer, (place, title) in sorted(titles.items())
    )
    return f'<div class="strip"><b>{escape(stack.name or "layers")}</b>{cells}</div>'


def _layers(outline: Outline) -> str:
    found = sections(outline)
    if not found:
        return ""
    head = "".join(
        f'<th class="{kind}">{name}</th>'
        for name, kind in (
            ("role", ""),
            ("weight", ""),
            ("out × in", "n"),
            ("heads", "n"),
            ("parameters", "n"),
            ("notes", ""),
        )
    )
    body = "".join(map(_section, found))
    table = f"<table><thead><tr>{head}</tr></thead>{body}</table>"
    return f'<section><h2>Layers</h2><div class="scroll">{table}</div></section>'


def _section(section: Section) -> str:
    times = f" × {section.times}" if section.times > 1 else ""
    title = f"{escape(section.title)}{times}<small>{escape(section.detail)}</small>"
    return f'<tbody><tr class="group"><td colspan="6">{title}</td></tr>{"".join(map(_row, section.components))}</tbody>'


def _row(part: Component) -> str:
    shape = " × ".join(map(str, part.shape)) if part.shape else ""
    heads = f"{part.heads} × {part.head_dim}" if part.heads and part.head_dim else ""
    values = f"{part.values:,}" if part.values else ""
    return (
        f'<tr data-site="{escape(part.key)}"><td class="role">{_swatch(part.role)}{escape(part.role)}</td>'
        f"<td><code>{escape(part.path)}</code></td>"
        f'<td class="n">{shape}</td><td class="n">{heads}</td><td class="n">{values}</td>'
        f'<td class="soft">{escape(", ".join(notes(part)))}</td></tr>'
    )


def _text(text: LayerText, is_open: bool) -> str:
    """Render the text of a layer, open or folded; a line of a component is linked to its box and its row."""
    lines = "".join(map(_line, text.lines))
    more = f'<p class="plain">{text.left_out:,} more lines: print(program.text())</p>' if text.left_out else ""
    title = f"The text of {escape(text.title)}"
    body = f'<pre class="layer">{lines}</pre>{more}'
    opened = " open" if is_open else ""
    return f"<section><details{opened}><summary>{title}</summary>{body}</details></section>"


def _line(line: tuple[str, str]) -> str:
    key, words = line
    site = f' data-site="{escape(key)}"' if key else ""
    return f"<span{site}>{escape(words)}\n</span>"


def _swatch(role: str) -> str:
    return f'<i class="swatch figure" style="--hue:var({KEY.get(role, "--none")})"></i>'


def _unmatched(outline: Outline) -> str:
    if not outline.unmatched:
        return ""
    rows: Sequence[str] = [
        f"<tr><td><code>{escape(one.id)}</code></td><td><code>{escape(one.path)}</code></td>"
        f'<td class="soft">{escape(one.reason)}</td></tr>'
        for one in outline.unmatched
    ]
    head = "<thead><tr><th>site</th><th>weight</th><th>why</th></tr></thead>"
    return (
        f"<section><h2>Projections without a role</h2><div class='scroll'><table>{head}<tbody>{''.join(rows)}"
        "</tbody></table></div></section>"
    )
