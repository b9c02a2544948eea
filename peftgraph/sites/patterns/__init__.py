"""Patterns: a small declarative language for sites of one's own.

    swiglu: down = linear(mul(act(~gate), ~up)); gate = linear(x); up = linear(x); act = silu:swiglu|gelu:geglu

A pattern is named equations over the values of a graph. `docs/patterns.md` is its manual. The language knows the flow
of a graph and nothing above it, so that the search for built-in roles may use it; `search.py` makes sites of matches.
"""
