"""What a model's code decides by sizes while it is exported: which of them it fixes, and which branches it takes.

An exported graph holds one branch of every `if n > 8:` and the number that a symbolic size became in `int(n)`. Both
are written down with the line that decided, so that a call that the line would treat differently can be refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch.fx.experimental import sym_node
from torch.fx.experimental.symbolic_shapes import (
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
    uninteresting_files,
)
from torch.utils._sympy.printers import PythonPrinter

from peftgraph.capture.diagnosis import is_model_code, source_line
from peftgraph.ir.signature import SizeCondition

COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
# Between a size and the code that compares it; and Python code of torch that chooses by sizes as a model's does.
BETWEEN = {str(torch.__file__), str(sym_node.__file__), __file__}
LIKE_A_MODEL = str(Path(str(torch.nn.__file__)).parent)


@dataclass
class SizeDecisions:
    """What the code of one export decided by sizes.

    Attributes:
        fixed: the symbols that became numbers, with the line that made them so ("" where none is known).
        branches: what held of the sizes where the code took a branch, with its line.
    """

    fixed: dict[sympy.Basic, str] = field(default_factory=dict)
    branches: dict[sympy.Basic, str] = field(default_factory=dict)

    def conditions(self, names: Mapping[sympy.Basic, sympy.Basic]) -> tuple[SizeCondition, ...]:
        """Return the branches as conditions on sizes by their names.

        Args:
            names: for the symbols of the inputs, a symbol with the printed name, or its number.
        """
        found = dict[str, SizeCondition]()
        for branch, place in self.branches.items():
            if branch.free_symbols <= set(names):
                named = branch.xreplace(dict(names))
                if named not in (sympy.true, sympy.false):
                    one = size_condition(named, place)
                    found.setdefault(one.code, one)
        return tuple(found.values())


def size_condition(expression: sympy.Basic, place: str) -> SizeCondition:
    """Return an expression over sizes that must hold, with the line of code that requires it."""
    sizes = tuple(sorted(str(symbol) for symbol in expression.free_symbols))
    return SizeCondition(PythonPrinter().doprint(expression), sizes, place)


@contextmanager
def record_size_decisions() -> Iterator[SizeDecisions]:
    """Record the decisions that depend on sizes. A comparison in the model's code is decided at once, since operators
    accept no symbolic bool (`is_causal=n > 1`)."""
    found = SizeDecisions()
    uninteresting_files().add(__file__)  # torch looks who asks: an `assert` of the model's code is none of a graph's
    replaced, truth = ShapeEnv._set_replacement, torch.SymBool.__bool__

    def replacing(env: ShapeEnv, symbol: sympy.Symbol, target: sympy.Expr, *rest: Any) -> None:
        if isinstance(target, sympy.Integer):
            found.fixed.setdefault(symbol, _line(sys._getframe(1), _is_models))
        replaced(env, symbol, target, *rest)

    def deciding(value: torch.SymBool) -> bool:
        frame = _asking(sys._getframe(1))
        if not _chooses(frame):
            return truth(value)
        expression = value.node.expr
        open_ = bool(expression.free_symbols) and not _is_settled(value)
        outcome = truth(value)
        if open_:
            held = expression if outcome else sympy.Not(expression)
            found.branches.setdefault(held, _line(frame, _is_models))
        return outcome

    with ExitStack() as stack:
        stack.enter_context(patch.object(ShapeEnv, "_set_replacement", replacing))
        stack.enter_context(patch.object(torch.SymBool, "__bool__", deciding))
        for kind in (torch.SymInt, torch.SymFloat):
            for name in COMPARISONS:
                stack.enter_context(patch.object(kind, name, _decided(getattr(kind, name))))
        yield found


def _is_settled(value: torch.SymBool) -> bool:
    """Tell whether the known facts about sizes decide a condition, or it is about values. Sizes are taken to be at
    least 2 here: size 1 is tested separately."""
    unbacked = bool(free_unbacked_symbols(value.node.expr))
    return unbacked or statically_known_true(value) or statically_known_true(torch.sym_not(value))


def _decided(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def compared(size: Any, other: Any) -> Any:
        result = compare(size, other)
        if not isinstance(result, torch.SymBool) or not _is_models(sys._getframe(1).f_code.co_filename):
            return result
        return result if free_unbacked_symbols(result.node.expr) else bool(result)

    return compared


def _asking(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_filename in BETWEEN:
        frame = frame.f_back
    return frame


def _chooses(frame: FrameType | None) -> bool:
    file = "" if frame is None else frame.f_code.co_filename
    return bool(file) and (_is_models(file) or file.startswith(LIKE_A_MODEL))


@cache
def _is_models(file: str) -> bool:
    return is_model_code(file) or (file.startswith("<") and not file.startswith("<frozen"))  # code without a file


def _line(frame: FrameType | None, wanted: Callable[[str], bool]) -> str:
    """Return the innermost line of `wanted` code at or above a frame."""
    while frame is not None and not wanted(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else source_line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
