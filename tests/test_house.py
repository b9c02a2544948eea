"""The house: which room may know which, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftgraph
import peftgraph.passes

ENGINE = Path(peftgraph.__file__).parent
PASSES = Path(peftgraph.passes.__file__).parent
ROOMS = ("ir", "trace", "sites", "rewrite", "fold", "lower", "interop", "cli")


def imports(path: Path) -> list[str]:
    """The absolute names of the modules that a file imports, at any depth of nesting."""
    package = (
        ["peftgraph", *path.relative_to(ENGINE).parts[:-1]] if path.is_relative_to(ENGINE) else ["peftgraph", "passes"]
    )
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.append(".".join([*base, *([node.module] if node.module else [])]))
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_the_rooms_before_them(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (ENGINE / room).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "peftgraph" and len(parts) > 1 and parts[1] in ROOMS:
                assert parts[1] in allowed, f"{path.name} of {room} imports {name}"


def test_the_engine_never_imports_a_pass() -> None:
    for path in ENGINE.rglob("*.py"):
        assert not any(name.startswith("peftgraph.passes") for name in imports(path)), path


def test_passes_import_only_the_facade() -> None:
    for path in PASSES.glob("*.py"):
        inner = [name for name in imports(path) if name.startswith("peftgraph.")]
        assert path.name == "__init__.py" or not inner, f"{path.name} imports {inner}"


def test_no_pickle_anywhere() -> None:
    for path in [*ENGINE.rglob("*.py"), *PASSES.glob("*.py")]:
        source = path.read_text()
        assert not {"pickle", "dill", "shelve", "marshal"} & set(imports(path)), path
        assert not re.search(r"(?<!safetensors\.)\btorch\.(load|save)\(", source), path


@pytest.mark.parametrize("module", ["transformers", "onnx", "onnxscript", "typer", "rich", "networkx"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, peftgraph, peftgraph.passes; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_documented() -> None:
    for name in dir(peftgraph):
        item = getattr(peftgraph, name)
        if not name.startswith("_") and callable(item):
            assert item.__doc__, name
