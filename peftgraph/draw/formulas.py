"""What is computed of parameters alone, as a formula; and sizes as letters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftgraph.sites import Site, Sites

SUM, PRODUCT, ATOM = range(3)  # how tightly a formula holds together
MOST = 3  # operands of a function that are written out
IN_LAYER = re.compile(r"^(?:[a-z]+_)?layer\d+_(?:self_|cross_)?")
SYMBOL = r"^\s+{name}: ([A-Z])\b"  # how a pass's docstring gives an option its letter: "rank: R, at least 1"


@dataclass(frozen=True)
class ParameterFormula:
    """A value that depends on parameters alone: one of them, or a formula.

    Attributes:
        text: the formula, or a name.
        shape: its sizes.
        names: the parameters in it, by their full names.
        own: whether a pass made one of them; else all are the base's.
        frozen: whether none of them trains.
        level: how tightly the formula holds together.
        formula: what a name stands for, where its pass named a formula.
        inner: the names within the formula, with what they stand for.
    """

    text: str
    shape: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    own: bool = True
    frozen: bool = False
    level: int = ATOM
    formula: str = ""
    inner: tuple[tuple[str, str], ...] = ()


def parameter(name: str, shape: Sequence[int], base: str | None, frozen: bool) -> ParameterFormula:
    """Return the formula of a stored tensor; `base` is its name in formulas if it belongs to the base."""
    text = base or short_name(name.rpartition(".")[2])
    return ParameterFormula(text, tuple(shape), (name,), base is None, frozen)


def short_name(name: str) -> str:
    """Return the name of a parameter in formulas: its last part, if that is a letter or upper-case.

    A name that says its layer is told without it, since a picture shows one layer.

    >>> [short_name(name) for name in ("lora_A", "ia3_l", "lora_B0", "prefix_k", "down_weight", "phm_rule")]
    ['A', 'l', 'B0', 'prefix_k', 'down', 'phm_rule']
    >>> [short_name(name) for name in ("layer0_self_lora_gate_weight", "decoder_layer12_gate", "layers_gate")]
    ['lora_gate', 'gate', 'layers_gate']
    """
    name = IN_LAYER.sub("", name)
    head, _, tail = name.rpartition("_")
    if head and re.fullmatch(r"[A-Z]\d?|[a-jl-np-uw-z]", tail):  # k, v and o are taken: they are the base's
        return tail
    return head if head and tail == "weight" else name


def formula(
    op: str, parts: Sequence[ParameterFormula], numbers: Sequence[float], shape: Sequence[int]
) -> ParameterFormula:
    """Return the formula of an operation whose operands depend on parameters alone.

    Args:
        op: the operator's name.
        parts: its operands, at least one.
        numbers: its numeric operands, where they matter.
        shape: of the result.
    """
    text, level = _spelled(op, parts, numbers)
    return ParameterFormula(
        text,
        tuple(shape),
        tuple(dict.fromkeys(name for part in parts for name in part.names)),
        any(part.own for part in parts),
        all(part.frozen for part in parts),
        level,
        inner=tuple(
            dict.fromkeys(
                one for part in parts for one in (*part.inner, *([(part.text, part.formula)] if part.formula else []))
            )
        ),
    )


def _spelled(op: str, parts: Sequence[ParameterFormula], numbers: Sequence[float]) -> tuple[str, int]:
    operands = [*(number(n) for n in numbers), *(_within(part, PRODUCT) for part in parts)]
    if op in ("mul", "matmul", "mm", "bmm"):
        return " ".join(operands), PRODUCT
    if op in ("add", "sub"):
        sign = " + " if op == "add" else " − "
        return sign.join([*(part.text for part in parts), *(number(n) for n in numbers)]), SUM
    if op == "div":
        return " / ".join([*(_within(part, ATOM) for part in parts), *(number(n) for n in numbers)]), PRODUCT
    if op == "linear":
        return f"{_within(parts[1], ATOM)}({parts[0].text})", ATOM
    if op == "linalg_vector_norm":
        return f"‖{parts[0].text}‖", ATOM
    return f"{op}({', '.join(part.text for part in parts[:MOST])}{', …' if len(parts) > MOST else ''})", ATOM


def _within(part: ParameterFormula, level: int) -> str:
    return part.text if part.level >= level else f"({part.text})"


def number(value: float) -> str:
    """Format a number exactly if that is short, otherwise to four digits.

    >>> number(2.0), number(1), number(0.35355339)
    ('2', '1', '0.3536')
    """
    return f"{value:.4g}"


class SizeSymbols:
    """Sizes as letters: D of the residual stream, F of the hidden value, and what a pass calls its own.

    A pass names the letter of an option in its docstring, as in "rank: R, at least 1".

    Args:
        base: the letters of the base.
        passes: for each application, the letters of its pass.
    """

    def __init__(self, base: Mapping[str, int], passes: Mapping[int, Mapping[str, int]]) -> None:
        self.base, self.passes = base, passes
        self.used: dict[tuple[str, int], None] = {}
        self.defined: dict[str, str] = {}  # names of values that parameters make, and their formulas

    @classmethod
    def of(cls, sites: Sites, methods: Mapping[int, Any]) -> SizeSymbols:
        """Return the letters for sizes of a model, and of passes by the order in which they were applied."""
        base: dict[str, int] = {}
        for role, letter in (("ffn.down", "D"), ("attention.o", "D"), ("ffn.hidden", "F")):
            sizes = {_size(site) for site in sites if site.role == role and site.shape}
            if len(sizes) == 1:
                base.setdefault(letter, sizes.pop())
        return cls(base, {application: dict(_options(method)) for application, method in methods.items()})

    def shape(self, shape: Sequence[int], application: int | None = None) -> str:
        """Such as "R × D", by the letters of the base and of one pass."""
        known = {**self.base, **self.passes.get(-1 if application is None else application, {})}
        return " × ".join(self._spelled(size, known) for size in shape)

    def _spelled(self, size: int, known: Mapping[str, int]) -> str:
        letter = next((letter for letter, one in known.items() if one == size), None)
        if letter is None:
            return str(size)
        self.used[letter, size] = None
        return letter

    @property
    def legend(self) -> str:
        """The letters that were used, with their sizes: "D 768 · R 8"."""
        return "  ·  ".join(f"{letter} {size:,}" for letter, size in sorted(self.used))


def _size(site: Site) -> int:
    assert site.shape is not None
    return site.shape[1] if site.role == "ffn.hidden" else site.shape[0]


def _options(method: Any) -> Iterable[tuple[str, int]]:
    """Yield the options of a pass that have a letter, with their values, including those of a pass inside it."""
    documented = "\n".join(one.__doc__ or "" for one in type(method).__mro__[:-1])
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(inner):
                yield from _options(inner)
        letter = re.search(SYMBOL.format(name=field.name), documented, re.MULTILINE)
        if letter and isinstance(value, int) and not isinstance(value, bool):
            yield letter[1], value
