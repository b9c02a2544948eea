"""`peftgraph doctor`: shows versions, what is supported, and what is cached."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any

import typer

from peftgraph.cli.options import Json
from peftgraph.terminal.console import emit, say

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "peftgraph"
PYTHONS = ((3, 11), (3, 13))  # the first and the last that are tested
SHOWN_EXTRAS = ("demo", "onnx", "quantise")
Row = dict[str, Any]


def doctor(as_json: Json = False) -> None:
    """Show the versions of Python and of packages, which of them are supported, the caches, and the devices.

    Exit code 1 if something that is needed is missing or not supported.
    """
    document = examine()
    if as_json:
        emit(document)
    else:
        for line in as_lines(document):
            say(line)
    if document["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Return what `peftgraph doctor --json` prints."""
    from peftgraph import __version__
    from peftgraph.utils.cache_folder import LARGEST, cache_folder, cached_files

    files = cached_files(cache_folder())
    python = {"version": platform.python_version(), "supported": ">=3.11,<3.14", "status": _python_status()}
    rows = list(_packages())
    needed = [row for row in rows if not row["extra"] and row["status"] != "supported"]
    problems = [f"{row['name']} {row['version'] or ''} is {row['status']}: {row['supported']}" for row in needed]
    problems += [] if python["status"] == "supported" else [f"Python {python['version']} is {python['status']}"]
    return {
        "peftgraph": __version__,
        "python": python,
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": rows,
        "devices": _devices(),
        "passes": _passes(),
        "cache": {
            "folder": str(cache_folder()),
            "traces": len(files),
            "bytes": sum(state.st_size for _, state in files),
            "most_bytes": LARGEST,
        },
        "problems": problems,
    }


def _python_status() -> str:
    now = sys.version_info[:2]
    return "supported" if PYTHONS[0] <= now <= PYTHONS[1] else "not tested" if now > PYTHONS[1] else "too old"


def _packages() -> list[Row]:
    """Return a row for each package that peftgraph or one of its extras for users requires."""
    from packaging.requirements import Requirement

    found: dict[str, Row] = {}
    for one in map(Requirement, requires(DISTRIBUTION) or []):
        extra = next((extra for extra in ("", *SHOWN_EXTRAS) if _is_wanted(one, extra)), None)
        if extra is not None and one.name != DISTRIBUTION and one.name not in found:
            supported = ",".join(sorted(str(part) for part in one.specifier))
            found[one.name] = {"name": one.name, "extra": extra, "supported": supported, **_installed(one)}
    return list(found.values())


def _is_wanted(one: Requirement, extra: str) -> bool:
    return one.marker is None or one.marker.evaluate({"extra": extra})


def _installed(one: Requirement) -> Row:
    try:
        now = version(one.name)
    except PackageNotFoundError:
        return {"version": None, "status": "not installed"}
    fits = one.specifier.contains(now, prereleases=True)
    return {"version": now, "status": "supported" if fits else "not supported"}


def _devices() -> list[str]:
    """Return the devices that torch sees; none where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    found = [f"cpu, {torch.get_num_threads()} threads"]
    return found + [f"cuda:{i}, {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


def _passes() -> dict[str, list[str]]:
    """Return the words of the passes, by the distribution that brings them."""
    from importlib.metadata import entry_points

    found: dict[str, list[str]] = {}
    for point in sorted(entry_points(group="peftgraph.passes"), key=lambda one: one.name):
        owner = point.dist.name if point.dist is not None else ""
        found.setdefault(owner, []).append(point.name)
    return found


def as_lines(document: dict[str, Any]) -> list[str]:
    """Return the document as lines for people."""
    python, cache = document["python"], document["cache"]
    lines = [
        f"peftgraph {document['peftgraph']} on Python {python['version']} ({python['status']}: {python['supported']})",
        f"{document['executable']}, {document['platform']}",
        "",
    ]
    width = max((len(row["name"]) for row in document["packages"]), default=0)
    for row in document["packages"]:
        extra = f", for peftgraph[{row['extra']}]" if row["extra"] else ""
        lines.append(
            f"  {row['name']:<{width}}  {row['version'] or '-':<14}  {row['status']} ({row['supported']}{extra})"
        )
    lines += ["", *(f"device  {one}" for one in document["devices"])]
    lines += [f"passes  {len(words)} of {owner}" for owner, words in document["passes"].items()]
    lines += [f"cache   {cache['folder']}: {cache['traces']} traces, {cache['bytes'] / 1e6:.1f} MB"]
    lines += [f"problem {one}" for one in document["problems"]] or ["everything that is needed is there"]
    return lines
