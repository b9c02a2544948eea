"""Says refusals in the words of the command line: what Python writes as an argument is an option here."""

from __future__ import annotations

from typing import Final

# What messages suggest in Python, and the option that does the same.
OPTIONS: Final = (
    (
        "pg.fold(program, partial=True) folds the rest and keeps these as they are",
        "peftgraph merge --partial folds the rest and keeps these as an adapter in the folder of the merged model",
    ),
    ("pg.fold(program, untie=True)", "peftgraph merge --whole --untie"),
    ("pg.fold(program, partial=True)", "peftgraph merge --partial"),
    ("Fold without untie, or export the program instead.", "Merge without --untie, or use peftgraph export."),
    ("Trace it from Python: pg.trace(model, example).", "Use it from Python: pg.trace(model, example)."),
)


def in_options(message: str) -> str:
    """Return a message with the options of commands in the place of Python's arguments."""
    for python, option in OPTIONS:
        message = message.replace(python, option)
    return message
