"""Reads sentences out of the documentation inside Python's own standard library.

Docstrings are read from source files, which are not imported. Only extension modules, which have no source, are
imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from peftgraph.demo.families import FAMILIES

WORDS = range(9, 31)  # a shorter sentence tells too little; a longer one is usually a list or a table


def modules_of(family: str) -> list[str]:
    """Return the sorted names of a family's modules; `package.*` is expanded from the standard library's folders."""
    root = Path(sysconfig.get_path("stdlib"))
    names: set[str] = set()
    for pattern in FAMILIES[family]:
        if not pattern.endswith(".*"):
            names.add(pattern)
            continue
        package = pattern.removesuffix(".*")
        folder = root.joinpath(*package.split("."))
        names |= {package} | {
            f"{package}.{file.stem}" for file in folder.glob("*.py") if not file.stem.startswith("__")
        }
    return sorted(names)


def docstrings(module: str) -> Iterator[str]:
    """Yield every docstring of a module, from its source or from the objects of an extension module."""
    path = Path(sysconfig.get_path("stdlib")).joinpath(*module.split("."))
    for source in (path.with_suffix(".py"), path / "__init__.py"):
        if source.is_file():
            yield from _from_source(source)
            break
    for name in (module, f"_{module}"):
        if "." not in module and not _has_source(name):
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


def rejection(text: str, module: str) -> str | None:
    """Return the reason why a sentence of a module is not used; None when it is used."""
    words = re.findall(r"[A-Za-z]+", text)
    if len(words) < WORDS.start:
        return f"shorter than {WORDS.start} words"
    if len(words) >= WORDS.stop:
        return f"longer than {WORDS.stop - 1} words"
    if not text[0].isupper() or text[-1] not in ".!?":
        return "no whole sentence"
    if re.search(r"->|=|\w\(|\{|\[\[|<\w+>|\\", text) or sum(map(str.isalpha, text)) < 0.72 * len(text):
        return "a signature, code or a table"
    if re.search(rf"\b({'|'.join(map(re.escape, module_words(module)))})s?\b", text, re.IGNORECASE):
        return "names its own module"
    return None


def module_words(module: str) -> list[str]:
    """Return the words that would give a module away: the parts of its dotted name, without underscores."""
    parts = {part.strip("_") for part in module.split(".")}
    return sorted(part for part in parts if part)
