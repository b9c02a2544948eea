"""The pages of docs/methods, from what each pass says and does; `python tests/support/method_pages.py` writes them.

A page's docstring, options, picture and counts are generated, so that they cannot drift. What other libraries do is
written by hand, below the last heading of each page, and is kept.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import survey_costs
import torch
import transformers
from published import ROWS, Row, traced

import peftgraph as pg
from peftgraph import passes
from peftgraph.authoring import Pass
from peftgraph.rewrite.count import Count
from peftgraph.rewrite.spec_text import print_value

DOCS = Path(__file__).parents[2] / "docs"
SURVEY = "## What each method costs"
HAND = "## Where other libraries differ"
MODEL = "BERT-base (12 x 768 x 3,072)"
RESNET = "ResNet (one stage of 3 blocks, 256 channels)"  # where a method has no meaning on BERT


CHOOSE = """## Which one to take

Begin with LoRA, with a learning rate about ten times that of full fine-tuning; `lora{at=linear}` adapts all projections
and costs more. Compare others with it on your own task: which method is best depends on the data, and no table knows
that. What a method costs can be known before. The columns are parts of full fine-tuning, and for a call, of the base;
[below](#what-each-method-costs) is how they are computed."""
CHOICES = (  # the wish, and the row of the survey's table
    ("a good start, of which nothing is left after folding", "LoRA"),
    ("the smallest file that folds: many tasks, few examples each", "(IA)³"),
    ("nothing new in the graph: only biases train", "BitFit"),
    ("ranks that are learned, where a fixed one is wasteful", "AdaLoRA"),
    ("a model whose weights do not fit in memory", "QLoRA"),
    ("few activations and the fastest step, for an extra network", "Ladder side-tuning"),
    ("a step that stops below the last layers", "the top two layers"),
    ("changes that are few and can be listed", "DiffPruning"),
    ("a nonlinear change", "Adapters"),
    ("such adapters with hardly any parameters", "Compacter"),
    ("one frozen model for all tasks, and the task in the input", "Prompt tuning"),
    ("the same in every layer", "Prefix tuning"),
)


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        title: of the page, and the name in the table.
        methods: what the table has a row for; the first one is drawn.
        model: what it is counted and drawn on.
    """

    title: str
    methods: tuple[Pass, ...]
    model: str = MODEL

    @property
    def name(self) -> str:
        """Of the file: the module of the pass."""
        return type(self.methods[0]).__module__.rpartition(".")[2]


PAGES = (
    Page("LoRA", (passes.LoRA(),)),
    Page("DoRA", (passes.DoRA(),)),
    Page("AdaLoRA", (passes.AdaLoRA(),)),
    Page("(IA)³", (passes.IA3(),)),
    Page("BitFit", (passes.BitFit(),)),
    Page("Train", (passes.Train(top=2), passes.Train(at=pg.norm))),
    Page("FreezeStatistics", (passes.FreezeStatistics(),), RESNET),
    Page("TrainableTokens", (passes.TrainableTokens(tokens=(1, 2, 3, 4)),)),
    Page("DiffPruning", (passes.DiffPruning(),)),
    Page("Intrinsic SAID", (passes.IntrinsicSAID(), passes.IntrinsicSAID(layer_scales=False))),
    Page("Quantise", (passes.Quantise(), passes.Quantise(format="int8"), passes.QLoRA())),
    Page("SerialAdapter", (passes.SerialAdapter(),)),
    Page("Houlsby", (passes.Houlsby(),)),
    Page("Pfeiffer", (passes.Pfeiffer(),)),
    Page("AdapterPlus", (passes.AdapterPlus(),)),
    Page("ParallelAdapter", (passes.ParallelAdapter(),)),
    Page("Compacter", (passes.Compacter(), passes.CompacterPP())),
    Page("AdapterDrop", (passes.AdapterDrop(adapter=passes.Houlsby(), layers=5),)),
    Page("AdapterFusion", (passes.AdapterFusion(adapters=("one", "two")),)),
    Page("CIAT", (passes.CIAT(),)),
    Page("Invertible", (passes.Invertible(),)),
    Page("Prefix", (passes.Prefix(), passes.Prefix(hidden=None))),
    Page("Prompt", (passes.Prompt(),)),
    Page("PTuning", (passes.PTuning(),)),
    Page("MAM", (passes.MAM(),)),
    Page("UniPELT", (passes.UniPELT(),)),
    Page("ZeroInitPrefix", (passes.ZeroInitPrefix(),)),
    Page("Ladder side-tuning", (passes.LadderSide(), passes.LadderSide(keep=(1, 2, 3, 5, 6, 7, 9, 10, 11)))),
    Page("LoReFT", (passes.LoReFT(),)),
)


def files() -> dict[Path, str]:
    """Every generated file, by its path below docs/, with what it must hold."""
    bases = {MODEL: traced("bert-base"), RESNET: resnet()}
    made: dict[Path, str] = {}
    rows: list[str] = []
    for page in PAGES:
        tuned = [bases[page.model].apply(method) for method in page.methods]
        made[Path(f"methods/{page.name}.svg")] = tuned[0].picture().svg
        made[Path(f"methods/{page.name}.md")] = _page(page, tuned)
        rows += [
            f"| {_linked(page, method)} | {_counted(program)} |"
            for method, program in zip(page.methods, tuned, strict=True)
            if page.model == MODEL
        ]
    made[Path("methods.md")] = _overview(rows, _kept_survey())
    return made


def _kept_survey() -> str:
    """The section of the survey's costs as it stands, which takes minutes to compute; `main` computes it."""
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    return text.partition(f"{SURVEY}\n\n")[2].partition("\n## ")[0]


def resnet() -> pg.Program:
    """A residual network of convolutions and batch norms, without weights."""
    config = transformers.ResNetConfig(hidden_sizes=[256], depths=[3])
    with torch.device("meta"):
        model = transformers.ResNetModel(config)
    return pg.trace(model, {"pixel_values": torch.zeros(2, 3, 32, 32, device="meta")}, verify="off")


# the overview


def _overview(rows: list[str], survey: str) -> str:
    counted = "\n".join(rows)
    published = "\n".join(map(_published, sorted(ROWS, key=lambda row: (type(row.method).__name__, row.model))))
    return f"""# Methods

Every method is one file of [passes](api/passes.md), has a page here, and works on any model whose parts are found.

{CHOOSE}

{_choices(survey)}

On your own model, `pg.compare(program, ["lora", "ia3"])` or `peftgraph compare DIR --recipes lora ia3` computes these
columns without weights.

## On {MODEL}

Each pass with its default options, counted by `program.count()` on a program without weights. **Trainable** is the
number of trained values, which an adapter directory stores; **changed** is the number of the base's values that differ
after folding everything that can be folded; **rank** is the rank of those differences.

| method | trainable | of the model | changed | rank of the change | folds |
|---|---|---|---|---|---|
{counted}

{SURVEY}

{survey}
## Comparison with published counts

Trained parameters on programs of the real configurations, compared with the numbers that the sources print. The last
column says whether they agree; tests check both numbers. Percentages refer to the source's total number of parameters.

| pass | model | exact | printed | where | agrees |
|---|---|---|---|---|---|
{published}
"""


def _choices(survey: str) -> str:
    """The table that helps to choose, with the costs of the survey's section."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in survey.splitlines() if line[:1] == "|"]
    costs = {row[0]: [cell.partition(" (")[0].replace("%", " %") for cell in row[1:]] for row in cells}
    recipes = {**{tick.method: tick.recipe for tick in survey_costs.TICKS}, **dict(survey_costs.OTHERS)}
    head = "| if you want ... | take | recipe | adapter file | training memory | step | call after folding |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for wish, name in CHOICES:
        file, memory, step, _, call = costs[name]
        lines.append(f"| {wish} | {name} | `{_cell(recipes[name])}` | {file} | {memory} | {step} | {call} |")
    return "\n".join(lines)


def _linked(page: Page, method: Pass) -> str:
    spec = _cell(f"`{_short(method)}`") if "{" in _short(method) or len(page.methods) > 1 else ""
    return f"[{page.title}](methods/{page.name}.md) {spec}".strip()


def _short(method: Pass) -> str:
    """The spec without the options that are as they are by default; it parses back too."""
    if isinstance(method, pg.Pipeline):
        return "; ".join(map(_short, method.passes()))
    shown = [f for f in dataclasses.fields(method) if getattr(method, f.name) != f.default]
    values = ((f.name, getattr(method, f.name)) for f in shown)
    options = [f"{name}={_short(value) if isinstance(value, Pass) else print_value(value)}" for name, value in values]
    return method.word + (f"{{{' '.join(options)}}}" if options else "")


def _counted(program: pg.Program) -> str:
    count = program.count()
    return " | ".join(
        [f"{count.trainable:,}", f"{count.percent:.3f} %", f"{count.changed:,}", _ranks(count), _folds(program)]
    )


def _ranks(count: Count) -> str:
    found: dict[str, int] = {}
    for change in count.changes:
        text = "vectors" if change.rank is None else "full" if change.full else f"{change.rank}"
        found[text] = found.get(text, 0) + 1
    parts = [f"{n} vectors" if text == "vectors" else f"{text} in {n}" for text, n in sorted(found.items())]
    return ", ".join(parts) or "none"


def _folds(program: pg.Program) -> str:
    """Whether a pass folds, by the rules that made the edits."""
    rules = {(e.application, e.rule): program.history[e.application].method.rules()[e.rule] for e in program.edits}
    kinds = {rule.fold if isinstance(rule.fold, str) else rule.delta is not None for rule in rules.values()}
    reasons = [one for one in kinds if isinstance(one, str)]
    if reasons:
        also = "; parameters that train in place fold" if kinds - set(reasons) else ""
        return _cell(f"no: {'; '.join(sorted(reasons))}{also}")
    return "yes" if True in kinds else "nothing is added"


def _published(row: Row) -> str:
    parts = (
        f"`{_short(row.method)}`",
        row.model,
        f"{row.exact:,}",
        row.printed,
        row.source,
        "yes" if row.agrees else "no",
    )
    return f"| {' | '.join(map(_cell, parts))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# one page


def _page(page: Page, tuned: list[pg.Program]) -> str:
    module = inspect.getmodule(type(page.methods[0]))
    assert module is not None
    assert module.__doc__ is not None
    title, algebra, text, source = _parts(module.__doc__)
    classes = list(dict.fromkeys(type(method) for method in page.methods))
    counts = "\n".join(f"| `{_cell(_short(m))}` | {_counted(p)} |" for m, p in zip(page.methods, tuned, strict=True))
    drawn = page.model.partition(" (")[0]
    picture = f"![What {page.title} does to a block of {drawn}]({page.name}.svg)"
    return f"""# {page.title}

{title}

```
{algebra}
```

{picture}

Drawn from the difference between a traced {drawn} and the rewritten program. The model's own parts are grey; dashed
parts do not train; `W`, `g` and `b` next to a part mark those of its own tensors that train.

{text}

## Options

{chr(10).join(_options(cls) for cls in classes)}
## On {page.model}

| pass | trainable | of the model | changed | rank of the change | folds |
|---|---|---|---|---|---|
{counts}

## Sources

{source}

{_by_hand(page)}"""


def _parts(doc: str) -> tuple[str, str, str, str]:
    """A docstring as title, algebra, text and sources."""
    title, _, rest = inspect.cleandoc(doc).partition("\n")
    lines = rest.strip("\n").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("    "))
    stop = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    algebra = "\n".join(line.removeprefix("    ") for line in lines[start:stop])
    body = "\n".join([*lines[:start], "", *lines[stop:]])
    body = re.sub(r"\n(Shapes|Source):", r"\n\n\1:", body)
    body = re.sub(r"\n\n((?: {4}.*\n?)+)", lambda m: f"\n\n```\n{inspect.cleandoc(m[1])}\n```\n", body)
    text, _, source = body.strip().partition("Source:")
    return title, algebra, text.strip(), source.strip()


def _options(cls: type[Pass]) -> str:
    documented = {}
    for one in reversed(cls.__mro__):
        documented |= dict(_attributes(one.__doc__ or ""))
    fields = [field for field in dataclasses.fields(cls) if field.name != "name"]
    rows = [f"| `{field.name}` | {_default(field)} | {_cell(documented.get(field.name, ''))} |" for field in fields]
    return "\n".join(
        [
            f"`{cls.__name__}`, in specs and recipes `{cls.word}`:\n",
            "| option | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    value = f'"{field.default}"' if isinstance(field.default, pg.Selector) else repr(field.default)
    return _cell("the three of the paper" if isinstance(field.default, tuple) and field.default else f"`{value}`")


def _attributes(doc: str) -> Iterator[tuple[str, str]]:
    block = inspect.cleandoc(doc).partition("Attributes:\n")[2]
    for match in re.finditer(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", block, re.MULTILINE):
        for name in match[1].split(", "):
            yield name, " ".join(match[2].split())


def _by_hand(page: Page) -> str:
    """The part of the page that is written by hand, as it is."""
    path = DOCS / "methods" / f"{page.name}.md"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    return f"{HAND}{before.partition(HAND)[2]}" if HAND in before else f"{HAND}\n"


def main() -> None:
    """Writes every file."""
    made = files()
    if "--survey" in sys.argv:
        made[Path("methods.md")] = made[Path("methods.md")].replace(_kept_survey(), survey_costs.section())
    for path, text in made.items():
        (DOCS / path).parent.mkdir(exist_ok=True)
        (DOCS / path).write_text(text, encoding="utf-8")
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
