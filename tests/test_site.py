"""The documentation site is whole: its pages, its navigation, the links between pages, the names in its reference.

`mkdocs build --strict` says the same and more; this needs no mkdocs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", flags=re.MULTILINE)
# A public name that is a module's too, and where the reference finds what is meant.
ELSEWHERE = {"peftgraph.facade.attention": "peftgraph.sites.selectors.selector.attention"}
TOPICS = ("attention", "gates", "modules", "quantised", "training", "sequence")
PUBLIC = re.compile(r"^from \S+ import \w+ as (\w+)$", flags=re.MULTILINE)


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def navigation() -> list[str]:
    """The pages that mkdocs.yml names, in order."""
    _, _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    return re.findall(r"^ +- (?:.*: )?(\S+\.md)$", re.split(r"^\S", nav, maxsplit=1, flags=re.MULTILINE)[0], re.M)


def prose(page: Path) -> str:
    """A page without its code."""
    return CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    titles = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def broken(page: Path, root: Path = DOCS) -> list[str]:
    """The links of a page that lead to no file below `root`, or to no heading of one."""
    found = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        inside = target.is_file() and target.is_relative_to(root)
        if not inside or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def test_the_navigation_names_every_page_once() -> None:
    assert sorted(navigation()) == sorted(page.relative_to(DOCS).as_posix() for page in pages())


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_between_pages_resolve(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n\n[here](#one) [there](#two) [gone](gone.md) `[code](x.md)` [out](https://example.org)\n")
    assert broken(page, tmp_path) == ["#two", "gone.md"]


REFERENCE = {
    "peftgraph": {"peftgraph/facade.py": "peftgraph.facade."},
    "authoring": {"peftgraph/authoring/__init__.py": "peftgraph.authoring."}
    | {f"peftgraph/authoring/{topic}.py": f"peftgraph.authoring.{topic}." for topic in TOPICS},
    "passes": {"passes/__init__.py": "passes."},
    "plugins": {"peftgraph/plugins.py": "peftgraph.plugins."},
}


@pytest.mark.parametrize("page", REFERENCE)
def test_the_reference_has_every_public_name(page: str) -> None:
    names: list[str] = []
    for source, prefix in REFERENCE[page].items():
        found = PUBLIC.findall((ROOT / source).read_text(encoding="utf-8"))
        assert found, source
        names += [prefix + name for name in found]
    listed = re.findall(r"^::: (\S+)$", (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = [name for name in listed if not name.startswith("peftgraph.testing")]
    assert sorted(listed) == sorted(ELSEWHERE.get(name, name) for name in names)


def test_nothing_is_fetched_by_a_reader() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^  font: false$", settings, flags=re.MULTILINE)
    assert "://" not in settings
