"""Reads sentences out of the documentation inside Python's own standard library.

Docstrings are read from source files, which are not imported. Only extension modules, which have no source, are
imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

WORDS = range(9, 23)  # a shorter sentence is rarely whole; a longer one is usually a list or a table
# Tests, programs, tables, and what is no prose.
SKIPPED = {"test", "idlelib", "turtledemo", "lib2to3", "pydoc_data", "this", "antigravity", "ensurepip", "venv"}


def library_modules() -> list[str]:
    """Return the sorted names of the top-level modules of the standard library that have documentation of their own.

    An extension module whose name begins with an underscore belongs to the module without it.
    """
    return sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED)


def docstrings(module: str) -> Iterator[str]:
    """Yield every docstring of a top-level module, of all files of a package, and of its extension module."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = [root / f"{module}.py", *sorted(root.joinpath(module).rglob("*.py"))]
    for source in filter(Path.is_file, sources):
        if not {"test", "tests"} & set(source.relative_to(root).parts):
            yield from _from_source(source)
    for name in (module, f"_{module}"):
        if not _has_source(name):
            yield from _from_extension(name)


def _has_source(name: str) -> bool:
    path = Path(sysconfig.get_path("stdlib")) / name
    return path.with_suffix(".py").is_file() or path.is_dir()


def _from_source(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text


def _from_extension(name: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a module that goes is documented as well
            module = importlib.import_module(name)
    except ImportError:
        return
    seen: set[str] = set()
    own = [value for _, value in sorted(vars(module).items()) if not isinstance(value, ModuleType)]
    for item in (module, *own):
        members = [value for _, value in sorted(vars(item).items())] if inspect.isclass(item) else []
        for value in (item, *members):
            if callable(value) or value is module or inspect.isdatadescriptor(value):
                written = getattr(value, "__doc__", None)
                text = inspect.cleandoc(written) if isinstance(written, str) else ""
                if text and text not in seen:
                    seen.add(text)
                    yield text


def sentences_in(docstring: str) -> Iterator[str]:
    """Yield the sentences of a docstring's prose; skips examples, tables, headings and indented code."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if any(line.lstrip().startswith((">>>", "...", "|", "+-", "==", "--", "@", ":param")) for line in lines):
            continue
        if len({len(line) - len(line.lstrip()) for line in lines}) > 2:
            continue
        text = " ".join(" ".join(lines).split())
        yield from re.split(r"(?<=[.!?])\s+(?=[A-Z(\"'`])", text)


def rejection(text: str) -> str | None:
    """Return the reason why a sentence is not used; None when it is used."""
    count = len(text.split())
    if count < WORDS.start:
        return f"shorter than {WORDS.start} words"
    if count >= WORDS.stop:
        return f"longer than {WORDS.stop - 1} words"
    if not text[0].isupper() or text[-1] not in ".!?":
        return "no whole sentence"
    if re.search(r"->|=|\w\(|\{|\[\[|<\w+>|\\", text) or sum(map(str.isalpha, text)) < 0.72 * len(text):
        return "a signature, code or a table"
    return None
