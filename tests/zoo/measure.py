"""One model of the zoo from building to its row of the report."""

from __future__ import annotations

import time
import warnings

from peftgraph.errors import PeftGraphError
from peftgraph.sites import find_sites
from peftgraph.trace import capture

from .entry import Entry
from .score import Row, Score, ties_of


def measure(entry: Entry) -> Row:
    """Builds, traces and scores one model. A refusal of the tracer is part of the row; other errors are raised."""
    row = Row(entry.name, entry.group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models of every age
        model = entry.build()
        example = entry.example(model)
        truth = entry.truth(model, example)
        try:
            program = capture(model, example)
        except PeftGraphError as error:
            row.refusal = str(error)
            return row
        start = time.perf_counter()
        sites = find_sites(program.graph, program.table.tensors())
        row.seconds = time.perf_counter() - start
    return Score(row, program, sites, truth, ties_of(model)).fill()
