"""Reads the options of a pass from its source, without importing it: passes import torch, for which the answer to a
typo should not wait.

Only what is plain is read: a class in a file, whose fields are annotated with Python's own types, selectors and passes,
and whose bases are such classes. Whatever is written in another way is left to the pass itself.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar, Literal

from peftgraph.sites.selectors.selector import Selector

ROOT = ("peftgraph.rewrite.method", "Pass")  # where every chain of bases ends
DEPTH = 16  # imports that lead to one class


class PassWithin:
    """Stands for the type of an option that is itself a pass."""


TYPES = {
    **{kind.__name__: kind for kind in (bool, int, float, str, tuple)},
    "Literal": Literal,
    "ClassVar": ClassVar,
    "Selector": Selector,
    "Pass": PassWithin,
}


@dataclass(frozen=True)
class DeclaredOptions:
    """The options of a pass, as its source declares them.

    Attributes:
        types: of every option, in the order of the fields.
        required: the options without a default.
    """

    types: dict[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()


def declared_options(module: str, name: str) -> DeclaredOptions | None:
    """Return the options of the pass `name` of a module; None where its source does not say them plainly."""
    found = _find_class(module, name, DEPTH)
    if found is None:
        return None
    owner, body = found
    fields: dict[str, Any] = {}
    required: dict[str, bool] = {}
    for base in body.bases if found != _root() else ():
        inherited = declared_options(owner, base.id) if isinstance(base, ast.Name) else None
        if inherited is None:
            return None
        fields |= inherited.types
        required |= {one: one in inherited.required for one in inherited.types}
    for statement in body.body:
        if not isinstance(statement, ast.AnnAssign):
            continue
        if not isinstance(statement.target, ast.Name):
            return None
        hint = _type_of(statement.annotation)
        if hint is None:
            return None
        if hint is not ClassVar:
            fields[statement.target.id] = hint
            required[statement.target.id] = statement.value is None
    return DeclaredOptions(fields, tuple(one for one in fields if required[one]))


def _type_of(annotation: ast.expr) -> Any:
    """Return the type that an annotation means; None where it is not one of those that are known here."""
    for part in ast.walk(annotation):
        if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and part.value.id == "ClassVar":
            return ClassVar
        if isinstance(part, ast.Call | ast.Lambda | ast.Attribute) and not _is_selector(part):
            return None
    try:
        return eval(ast.unparse(annotation).replace("pg.Selector", "Selector"), {"__builtins__": {}}, dict(TYPES))
    except (NameError, TypeError, SyntaxError):
        return None


def _is_selector(part: ast.AST) -> bool:
    return isinstance(part, ast.Attribute) and ast.unparse(part) == "pg.Selector"


@cache
def _root() -> tuple[str, ast.ClassDef] | None:
    return _find_class(*ROOT, DEPTH)


@cache
def _find_class(module: str, name: str, depth: int) -> tuple[str, ast.ClassDef] | None:
    """Return the module that defines a class, found through the imports of its name, and the definition."""
    tree = _tree(module)
    if tree is None or depth == 0:
        return None
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return module, statement
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(_absolute(statement, module), alias.name, depth - 1)
    return None


def _absolute(statement: ast.ImportFrom, module: str) -> str:
    if not statement.level:
        return statement.module or ""
    spec = _spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    parts = module.split(".")
    parts = parts[: len(parts) - statement.level + is_package]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


@cache
def _tree(module: str) -> ast.Module | None:
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    try:
        return ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


@cache
def _spec(module: str) -> ModuleSpec | None:
    """Find a module without importing the packages that it is in."""
    path: list[str] | None = None
    found: ModuleSpec | None = None
    for name in _parents(module):
        if found is not None:
            path = list(found.submodule_search_locations or ())
        specs = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        found = next((spec for spec in specs if spec is not None), None)
        if found is None:
            return None
    return found


def _parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))
