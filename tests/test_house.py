"""The house: which room may know which, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FunctionType

import pytest
import rooms_picture
from importlinter.cli import lint_imports

import peftgraph
import peftgraph.passes

ENGINE = Path(peftgraph.__file__).parent
PASSES = Path(peftgraph.passes.__file__).parent
TOPICS = ("attention", "gates", "modules", "sequence")
AUTHORING = ["peftgraph.authoring", *(f"peftgraph.authoring.{topic}" for topic in TOPICS)]
ROOT = Path(__file__).parent.parent


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


def test_rooms_know_only_the_rooms_below_them_and_nothing_imports_in_a_circle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    kept = lint_imports(config_filename="pyproject.toml", cache_dir=None) == 0
    assert kept, capsys.readouterr().out


PLUGINS = ("interop/peft", "interop/adapterhub")  # found by entry points, as passes are


def test_the_engine_never_imports_a_pass_or_a_format_that_knows_passes() -> None:
    packages = tuple("peftgraph." + plugin.replace("/", ".") for plugin in PLUGINS)
    for path in ENGINE.rglob("*.py"):
        own = next((plugin for plugin in PLUGINS if path.is_relative_to(ENGINE / plugin)), None)
        for name in imports(path):
            allowed = own is not None and name.startswith("peftgraph." + own.replace("/", "."))
            assert own or not name.startswith("peftgraph.passes"), f"{path} imports {name}"
            assert allowed or not name.startswith(packages), f"{path} imports {name}"


def test_passes_import_only_the_public_surfaces_and_the_passes_they_are_made_of() -> None:
    allowed = {"peftgraph", "peftgraph.authoring"} | {f"peftgraph.passes.{path.stem}" for path in PASSES.glob("*.py")}
    allowed |= {f"peftgraph.authoring.{path.stem}" for path in (ENGINE / "authoring").glob("*.py")}
    for path in PASSES.glob("*.py"):
        inner = [name for name in imports(path) if name.startswith("peftgraph") and name not in allowed]
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
        "from peftgraph import trace, fold, Program, losses\n"
        "assert pg.trace is trace and pg.fold is fold and not isinstance(trace, types.ModuleType)\n"
        "assert {'trace', 'fold', 'Program', 'attention', 'losses'} <= set(dir(pg))\n"
        "assert pg.losses is losses and isinstance(losses, types.ModuleType)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'peftgraph' has no attribute 'nonsense'"):
        peftgraph.nonsense  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_every_public_name_is_documented() -> None:
    surfaces = [peftgraph, *(importlib.import_module(name) for name in AUTHORING)]
    for name, item in ((name, getattr(surface, name)) for surface in surfaces for name in dir(surface)):
        if not name.startswith("_") and isinstance(item, type | FunctionType):
            assert item.__doc__, name


def test_the_two_surfaces_share_no_name() -> None:
    users = {name for name in dir(peftgraph) if not name.startswith("_")}
    writers = {name for surface in AUTHORING for name, _ in exported(surface)}
    modules = {surface.rpartition(".")[2] for surface in AUTHORING}
    assert users & writers - modules == set()


def exported(surface: str) -> list[tuple[str, str]]:
    """The names that a module of a public surface exports, each with its source."""
    path = ENGINE.joinpath(*surface.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    nodes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)]
    return [(alias.name, f"{node.module}") for node in nodes for alias in node.names]


def test_every_package_is_installed() -> None:
    root = ROOT
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(one.parent.relative_to(root).parts) for one in (root / "peftgraph").rglob("__init__.py")}
    assert found | {"peftgraph.passes"} == set(listed)


def test_the_picture_of_the_rooms_is_drawn_from_the_imports() -> None:
    drawn = rooms_picture.imports()
    order = {room: i for i, room in enumerate(rooms_picture.rooms())}
    assert all(order[start] < order[end] for start, end in drawn.edges)
    assert ("program", "costs") in drawn.edges
    assert ("program", "ir") not in drawn.edges  # costs knows it
    file = rooms_picture.FILE.read_text(encoding="utf-8")
    assert re.findall(">(\\w+)</text>", file) == list(order), "run tests/support/rooms_picture.py"
    assert rooms_picture.picture().count("<path") == 2 * len(drawn.edges)
