"""Ports: the places around a site at which an edit reads a value or puts another one.

A site's own ports have the names of `PORTS`. Every site also has those of the model: its inputs, its results and its
stored tensors, which `input_port("input_ids")`, `result_port("logits")` and `stored_port("head.weight")` name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class PortKind(StrEnum):
    """Who reads another value once an edit enters at a port."""

    OUTPUT = "output"
    """A value that the site gives: all who read it read the new one."""
    EDGE = "edge"
    """A value that the site reads: the site alone reads the new one."""
    WEIGHT = "weight"
    """The stored tensor that the site's operator multiplies by: all who read it read the new one."""
    MODEL_INPUT = "model input"
    """An input of the model, whatever the site: all who read it read the new one."""
    MODEL_OUTPUT = "model output"
    """A value that the model returns, whatever the site: the caller alone gets the new one."""


@dataclass(frozen=True)
class Port:
    """A place at which an edit can read a value or put another one.

    Attributes:
        name: the word for it, as in `Add(port="output")`.
        kind: who is affected by an edit there.
        meaning: what is there, with its shape.
        broadcasts: whether a value of more axes, or of larger ones where the old value has 1, fits there too.
        before_dropout_of: the port whose value this one is before its dropout; "" for a value of its own.
    """

    name: str
    kind: PortKind
    meaning: str
    broadcasts: bool = False
    before_dropout_of: str = ""


PORTS: Final[Mapping[str, Port]] = MappingProxyType(
    {
        one.name: one
        for one in (
            Port("input", PortKind.EDGE, "the site's input, (..., I)"),
            Port("output", PortKind.OUTPUT, "the site's output, (..., O)"),
            Port("weight", PortKind.WEIGHT, "the weight of the site's operator, in its stored layout"),
            Port("undropped", PortKind.OUTPUT, "the output before its dropout", before_dropout_of="output"),
            Port(
                "embedded",
                PortKind.OUTPUT,
                "the input before its dropout: of a first block, the embedded tokens",
                before_dropout_of="input",
            ),
            Port("residual", PortKind.EDGE, "the residual stream that the sublayer's result is added to, (B, T, D)"),
            Port("join", PortKind.OUTPUT, "the residual sum, (B, T, D)"),
            Port("normed", PortKind.OUTPUT, "the residual sum after the norm that follows it (post-norm), (B, T, D)"),
            Port(
                "memory",
                PortKind.EDGE,
                "the value that keys and values of a cross attention are projected from, (B, S, D)",
            ),
            Port("q", PortKind.EDGE, "queries, (B, H, T, d) or in the model's own layout"),
            Port("k", PortKind.EDGE, "keys, (B, H, S, d), not transposed"),
            Port("v", PortKind.EDGE, "values, (B, H, S, d)"),
            Port("mask", PortKind.EDGE, "the mask or bias that is added to the scores, (B, H, T, S)", broadcasts=True),
            Port("keys", PortKind.EDGE, "keys before they are repeated for the queries that share them"),
            Port("values", PortKind.EDGE, "values before they are repeated for the queries that share them"),
            Port("scored", PortKind.EDGE, "the factor of q in a product that is written out: keys, transposed"),
            Port("scores", PortKind.EDGE, "the argument of a softmax that is written out, (B, H, T, S)"),
            Port("product", PortKind.EDGE, "the product q k^T that is written out"),
            Port("product1", PortKind.EDGE, "the second product of scores that are a sum of several"),
            Port("product2", PortKind.EDGE, "the third product of scores that are a sum of several"),
            Port("offsets", PortKind.EDGE, "where the rows of each expert end, of a grouped product"),
            Port("chosen", PortKind.EDGE, "the expert of each row, of a stack whose matrices are gathered"),
        )
    }
)

_INPUT, _OUTPUT, _STORED = "input:", "result:", "stored:"
_KINDS: Final = {_INPUT: PortKind.MODEL_INPUT, _OUTPUT: PortKind.MODEL_OUTPUT, _STORED: PortKind.WEIGHT}


def input_port(name: str) -> str:
    """Return the port of an input of the model, by the name of its node."""
    return _INPUT + name


def result_port(name: str) -> str:
    """Return the port of a value that the model returns, by the name of its node."""
    return _OUTPUT + name


def stored_port(name: str) -> str:
    """Return the port of a stored tensor, by a name that it is read under."""
    return _STORED + name


def kind_of(port: str) -> PortKind | None:
    """Return the kind of a port; None for an unknown name."""
    if port in PORTS:
        return PORTS[port].kind
    return _KINDS.get(port[: port.find(":") + 1])


def named_part(port: str) -> str | None:
    """Return what a port of the model names: an input, a result or a stored tensor; None for a port of a site."""
    return None if port in PORTS or kind_of(port) is None else port.partition(":")[2]


def is_read_by_all(port: str) -> bool:
    """Tell whether all who read the value at a port read what an edit puts there, and not the site alone."""
    return kind_of(port) not in (PortKind.EDGE, PortKind.MODEL_OUTPUT, None)
