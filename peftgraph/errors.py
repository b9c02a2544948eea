"""The errors that a user's input can cause; every message names what is wrong, where, and what to do."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).parent)
WIDTH = 200  # characters of a line that a message shows


class PeftGraphError(ValueError):
    """The root of every error that a user's input can cause."""


class TraceError(PeftGraphError):
    """The model cannot be traced as it is."""


class CallError(PeftGraphError, TypeError):
    """A module was called with inputs that its graph was not traced for."""


class NoMatch(PeftGraphError):
    """A selector found no site; the message shows the nearest miss."""


class Ambiguous(PeftGraphError):
    """A selector has more than one meaning on this model; the message shows how to say each."""


class Conflict(PeftGraphError):
    """Two passes, or two adapters, claim the same thing."""


class RecipeError(PeftGraphError):
    """A spec or a recipe file cannot be read."""


class AdapterError(PeftGraphError):
    """Adapter files are damaged, or fit another base."""


class ExportError(PeftGraphError):
    """A program cannot be written in the format asked for."""


class NoPickle(PeftGraphError, TypeError):
    """A module cannot be pickled; the message says what to save instead."""


class NoFold(PeftGraphError):
    """Some edits cannot be folded exactly.

    Attributes:
        reasons: one line for each site, `site: reason`.
    """

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        lines = "\n  ".join(reasons)
        super().__init__(
            f"{len(reasons)} edit(s) cannot be folded exactly:\n  {lines}\n"
            "Nothing was changed. pg.fold(program, partial=True) folds the rest and keeps these as they are."
        )


class QuantisedWeights(NoFold):
    """Weights are stored as codes, and no change folds into codes exactly.

    Attributes:
        reasons: one line for each edit, `site: reason`.
    """

    def __init__(self, reasons: list[str], weights: int) -> None:
        super().__init__(reasons)
        self.args = (
            f"{weights} weight(s) are stored as codes (quantised), and a change does not fold into codes "
            f"exactly:\n  {_first(reasons)}\nNothing was changed. The exact ways out:\n"
            '  pg.fold(program, quantised="dequantise") folds into the dequantised weights, without codes\n'
            "  program.module(), save_adapter() and export() keep the adapters beside the codes\n"
            "  pg.fold(program, partial=True) folds what does not touch codes\n"
            'Not exact: quantised="requantise" quantises the folded weights anew and reports the error of each site.',
        )


def _first(reasons: list[str]) -> str:
    more = f"\n  ... and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    return "\n  ".join(reasons[:4]) + more


class PeftGraphWarning(UserWarning):
    """A request was carried out only in part; the message says what was left out."""


class LeftOut(PeftGraphWarning):
    """A pass has no site at some attentions or sublayers of the kind that it was applied to; `program.left_out` lists
    them."""


def warn(words: str, category: type[PeftGraphWarning] = PeftGraphWarning) -> None:
    """Warn at the line of the caller's own code that called into this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(words, category, stacklevel=level)


class VerifyError(AssertionError):
    """A program broke a rule of the verifier: a bug in a pass or in the engine, never in the user's input."""


def pointed(text: str, position: int) -> str:
    """Return the line of a text that contains a position, shortened around it if it is long, with a caret below the
    position."""
    start = text.rfind("\n", 0, position) + 1
    line, at = text[start:].partition("\n")[0], position - start
    if len(line) > WIDTH:
        first = max(0, at - WIDTH // 2)
        line, at = line[first : first + WIDTH], at - first
    return f"  {line}\n  {' ' * at}^"


def shortened(text: str) -> str:
    """Shorten a text of any length for a message."""
    return text if len(text) <= 2 * WIDTH else f"{text[: 2 * WIDTH]}..."
