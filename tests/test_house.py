"""The house: which room may know which, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import peftgraph
import peftgraph.passes

ENGINE = Path(peftgraph.__file__).parent
PASSES = Path(peftgraph.passes.__file__).parent
ROOMS = ("utils", "ir", "capture", "sites", "draw", "rewrite", "folding", "runtime", "interop", "cli", "demo")


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


LATER = {"cli/cmd_quickstart.py": {"demo"}}  # the files that may know a room after their own


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_the_rooms_before_them(room: str) -> None:
    before = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (ENGINE / room).rglob("*.py"):
        allowed = before | LATER.get(path.relative_to(ENGINE).as_posix(), set())
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "peftgraph" and len(parts) > 1 and parts[1] in ROOMS:
                assert parts[1] in allowed, f"{path.name} of {room} imports {name}"


def test_the_engine_never_imports_a_pass() -> None:
    for path in ENGINE.rglob("*.py"):
        assert not any(name.startswith("peftgraph.passes") for name in imports(path)), path


def test_passes_import_only_the_facade_and_the_passes_they_are_made_of() -> None:
    passes = {f"peftgraph.passes.{path.stem}" for path in PASSES.glob("*.py")}
    for path in PASSES.glob("*.py"):
        inner = [name for name in imports(path) if name.startswith("peftgraph.") and name not in passes]
        assert path.name == "__init__.py" or not inner, f"{path.name} imports {inner}"


def test_no_pickle_anywhere() -> None:
    for path in [*ENGINE.rglob("*.py"), *PASSES.glob("*.py")]:
        source = path.read_text()
        assert not {"pickle", "dill", "shelve", "marshal"} & set(imports(path)), path
        assert not re.search(r"(?<!safetensors\.)\btorch\.(load|save)\(", source), path


def test_import_is_light() -> None:
    heavy = {"transformers", "onnx", "onnxscript", "typer", "rich", "networkx"}
    code = f"import sys, peftgraph.facade, peftgraph.passes; sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


COMMANDS = ("inspect", "apply", "merge", "export", "quickstart")
QUICK = [["--help"], ["--version"], ["nonsense"], *([command, "--help"] for command in COMMANDS), ["inspect"]]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_help_and_wrong_usage_are_answered_without_torch(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "from peftgraph.cli import main\n"
        "atexit.register(lambda: print('imported:', sorted({'torch', 'transformers', 'sympy'} & set(sys.modules))))\n"
        f"sys.argv = ['peftgraph', *{arguments!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if arguments[-1].startswith("--") else 2)
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert len(done.stdout + done.stderr) > len("imported: []\n")


@pytest.mark.parametrize(
    "first", ["peftgraph.capture.trace_model", "peftgraph.folding", "peftgraph.program", "peftgraph.facade"]
)
def test_the_facade_is_the_same_whatever_was_imported_first(first: str) -> None:
    code = (
        f"import {first}, peftgraph as pg, types\n"
        "from peftgraph import trace, fold, Program, init\n"
        "assert pg.trace is trace and pg.fold is fold and not isinstance(trace, types.ModuleType)\n"
        "assert {'trace', 'fold', 'Program', 'attention', 'init'} <= set(dir(pg))\n"
        "assert pg.init is init and isinstance(init, types.ModuleType)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'peftgraph' has no attribute 'nonsense'"):
        peftgraph.nonsense  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_every_public_name_is_documented() -> None:
    for name in dir(peftgraph):
        item = getattr(peftgraph, name)
        if not name.startswith("_") and callable(item):
            assert item.__doc__, name


def test_every_package_is_installed() -> None:
    root = Path(__file__).parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(one.parent.relative_to(root).parts) for one in (root / "peftgraph").rglob("__init__.py")}
    assert found | {"peftgraph.passes"} == set(listed)
