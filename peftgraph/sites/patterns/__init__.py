"""Patterns: a small declarative language for sites of one's own.

    swiglu: down = linear(mul(act(~gate), ~up)); gate = linear(x); up = linear(x); act = silu:swiglu|gelu:geglu

A pattern is named equations over the values of a graph. `docs/patterns.md` is its manual.
"""

from .explain import explain_pattern as explain_pattern
from .match import Matcher as Matcher
from .match import Miss as Miss
from .pattern import Pattern as Pattern
from .pattern import PatternRole as PatternRole
from .search import PatternSearch as PatternSearch
from .search import search as search
from .terms import Term as Term
from .terms import op as op
from .terms import var as var
