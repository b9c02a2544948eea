"""Real sentences for the quickstart: the documentation inside Python's own standard library, and a split without leaks.

Docstrings are read from source files without importing them; only extension modules, which have no source, are
imported.
A split goes by module: no module gives sentences to two parts, and no two sentences of the corpus are near copies.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from peftgraph.cli.families import FAMILIES

WORDS = range(9, 31)  # sentences outside are too short to tell anything, or lists and tables
SHINGLE = 3
NEAR = 0.5  # Jaccard similarity of word triples from which two sentences count as copies
PARTS = ("train", "validation", "test")
SHARES = (0.55, 0.2, 0.25)


@dataclass(frozen=True)
class Sentence:
    """One sentence of documentation, the module it stands in, and that module's family."""

    text: str
    module: str
    family: str


@dataclass(frozen=True)
class Corpus:
    """Sentences in three parts, and what was left out on the way.

    Attributes:
        families: the classes, in order; a label is an index into them.
        parts: part -> its sentences.
        dropped: reason -> how many sentences.
    """

    families: tuple[str, ...]
    parts: Mapping[str, tuple[Sentence, ...]]
    dropped: Mapping[str, int]

    def texts(self, part: str) -> list[str]:
        """The sentences of a part."""
        return [sentence.text for sentence in self.parts[part]]

    def labels(self, part: str) -> list[int]:
        """The family of each sentence of a part, as an index into `families`."""
        return [self.families.index(sentence.family) for sentence in self.parts[part]]


def build_corpus(seed: int, per_module: int = 40, per_family: int = 500) -> Corpus:
    """The corpus of this Python's standard library.

    Args:
        seed: decides which sentences are kept where there are too many, and the split.
        per_module: no module gives more than this many, so that none is a family by itself.
        per_family: nor does a family, so that none dominates.
    """
    dropped: Counter[str] = Counter()
    sentences = [sentence for family in FAMILIES for sentence in family_sentences(family, dropped)]
    sentences = without_copies(sentences, dropped)
    rng = random.Random(seed)
    sentences = _thinned(sentences, lambda s: s.module, per_module, rng, dropped, "beyond the limit of a module")
    sentences = _thinned(sentences, lambda s: s.family, per_family, rng, dropped, "beyond the limit of a family")
    return Corpus(tuple(FAMILIES), split(sentences, rng), dict(dropped))


def family_sentences(family: str, dropped: Counter[str]) -> list[Sentence]:
    """The clean sentences of one family; the others are counted in `dropped` by reason."""
    found: list[Sentence] = []
    for module in modules_of(family):
        for docstring in docstrings(module):
            for text in sentences_in(docstring):
                reason = flaw(text, module)
                if reason is None:
                    found.append(Sentence(text, module, family))
                else:
                    dropped[reason] += 1
    return found


def modules_of(family: str) -> list[str]:
    """The names of a family's modules, sorted; `package.*` is spelled out from the standard library's folders."""
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
    """Every docstring of a module: read from its source, or from the objects of an extension module."""
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
    for item in (
        module,
        *(value for _, value in sorted(vars(module).items()) if not isinstance(value, ModuleType)),
    ):
        members = [value for _, value in sorted(vars(item).items())] if inspect.isclass(item) else []
        for value in (item, *members):
            if callable(value) or value is module or inspect.isdatadescriptor(value):
                written = getattr(value, "__doc__", None)
                text = inspect.cleandoc(written) if isinstance(written, str) else ""
                if text and text not in seen:
                    seen.add(text)
                    yield text


def sentences_in(docstring: str) -> Iterator[str]:
    """The sentences of a docstring's running text: examples, tables, headings and indented code are passed over."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if any(line.lstrip().startswith((">>>", "...", "|", "+-", "==", "--", "@", ":param")) for line in lines):
            continue
        if len({len(line) - len(line.lstrip()) for line in lines}) > 2:
            continue
        text = " ".join(" ".join(lines).split())
        yield from re.split(r"(?<=[.!?])\s+(?=[A-Z(\"'`])", text)


def flaw(text: str, module: str) -> str | None:
    """Why a sentence is not used; None when it is."""
    words = re.findall(r"[A-Za-z]+", text)
    if len(words) < WORDS.start:
        return f"shorter than {WORDS.start} words"
    if len(words) >= WORDS.stop:
        return f"longer than {WORDS.stop - 1} words"
    if not text[0].isupper() or text[-1] not in ".!?":
        return "no whole sentence"
    if re.search(r"->|=|\w\(|\{|\[\[|<\w+>|\\", text) or sum(map(str.isalpha, text)) < 0.72 * len(text):
        return "a signature, code or a table"
    if re.search(rf"\b({'|'.join(map(re.escape, own_names(module)))})s?\b", text, re.IGNORECASE):
        return "names its own module"
    return None


def own_names(module: str) -> list[str]:
    """The words that would give a module away: every part of its dotted name, with and without an underscore."""
    parts = {part.strip("_") for part in module.split(".")}
    return sorted(part for part in parts if part)


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The set of a sentence's word triples, in lower case; two sentences are near copies when most of them agree."""
    words = re.findall(r"[a-z]+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


def without_copies(sentences: Sequence[Sentence], dropped: Counter[str]) -> list[Sentence]:
    """The sentences such that no two are near copies.

    Of copies within one family the first stays. A sentence that stands in two families tells neither: all its copies
    go.
    """
    kept: dict[int, tuple[Sentence, frozenset[tuple[str, ...]]]] = {}
    ambiguous: set[int] = set()
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, sentence in enumerate(sentences):
        own = shingles(sentence.text)
        copies = _copies(own, kept, index)
        if not copies:
            kept[number] = (sentence, own)
            for shingle in own:
                index[shingle].append(number)
            continue
        dropped["a near copy of another"] += 1
        ambiguous |= {other for other in copies if kept[other][0].family != sentence.family}
    dropped["stands in two families"] += len(ambiguous)
    return [sentence for number, (sentence, _) in kept.items() if number not in ambiguous]


def _copies(
    own: frozenset[tuple[str, ...]],
    kept: Mapping[int, tuple[Sentence, frozenset[tuple[str, ...]]]],
    index: Mapping[tuple[str, ...], Sequence[int]],
) -> list[int]:
    shared = Counter(number for shingle in own for number in index.get(shingle, ()))
    return [number for number, common in shared.items() if common >= NEAR * (len(own) + len(kept[number][1]) - common)]


def split(sentences: Sequence[Sentence], rng: random.Random) -> dict[str, tuple[Sentence, ...]]:
    """The sentences in three parts; in each family, whole modules go to the part that lacks the most."""
    parts: dict[str, list[Sentence]] = {part: [] for part in PARTS}
    for family in dict.fromkeys(sentence.family for sentence in sentences):
        groups: defaultdict[str, list[Sentence]] = defaultdict(list)
        for sentence in sentences:
            if sentence.family == family:
                groups[sentence.module].append(sentence)
        order = sorted(groups.values(), key=lambda group: (-len(group), rng.random()))
        total = sum(map(len, order))
        filled = dict.fromkeys(PARTS, 0)
        for group in order:
            part = max(PARTS, key=lambda name: SHARES[PARTS.index(name)] * total - filled[name])
            filled[part] += len(group)
            parts[part] += group
    for chosen in parts.values():
        rng.shuffle(chosen)
    return {part: tuple(chosen) for part, chosen in parts.items()}


def _thinned(
    sentences: Sequence[Sentence],
    key: Callable[[Sentence], str],
    limit: int,
    rng: random.Random,
    dropped: Counter[str],
    reason: str,
) -> list[Sentence]:
    groups: defaultdict[str, list[Sentence]] = defaultdict(list)
    for sentence in sentences:
        groups[key(sentence)].append(sentence)
    kept: list[Sentence] = []
    for group in groups.values():
        kept += rng.sample(group, limit) if len(group) > limit else group
        dropped[reason] += max(0, len(group) - limit)
    return kept
