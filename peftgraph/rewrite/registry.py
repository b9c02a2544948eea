"""Finds passes by their word: those that were registered in this process, and those of installed distributions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from peftgraph.errors import RecipeError
from peftgraph.rewrite.spec_text import PIPELINE
from peftgraph.utils.registry import Registry

if TYPE_CHECKING:
    from peftgraph.rewrite.method import Pass

C = TypeVar("C", bound="type[Pass]")


def _is_pass(one: object) -> bool:
    from peftgraph.rewrite.method import Pass

    return isinstance(one, type) and issubclass(one, Pass)


PASSES: Registry[type[Pass]] = Registry(
    "peftgraph.passes",
    "pass",
    RecipeError,
    kind="class of passes",
    accepts=_is_pass,
    name_of=lambda one: one.word,
    how_to_add="pg.register(MyPass)",
)


def register(cls: C) -> C:
    """Register a pass under its word in this process, so that specs, recipes and adapter directories can name it.

    An entry point of the group `peftgraph.passes` does the same for every process that the distribution is installed
    for. A class that is defined again, as in a notebook, takes the place of the earlier one.

    Args:
        cls: a subclass of `peftgraph.authoring.Pass` whose `word` is an identifier.

    Returns:
        The class, so that `register` can be used as a decorator.

    Raises:
        RecipeError: it is no pass, has no word that a spec can spell, or another pass has that word.

    Example:
        ```python
        @pg.register
        @dataclass(frozen=True, kw_only=True)
        class VeRA(Pass):
            word = "vera"
        ```
    """
    if not _is_pass(cls):
        raise RecipeError(f"register() takes a class of passes, a subclass of peftgraph.authoring.Pass, got {cls!r}.")
    word = cls.word
    if not (isinstance(word, str) and word.isascii() and word.isidentifier()):
        raise RecipeError(f'{_path(cls)} needs a word that specs can spell, such as word = "lora", got {word!r}.')
    taken = "peftgraph.rewrite.method:Pipeline" if word == PIPELINE else PASSES.where(word, _path)
    if taken is not None and taken != _path(cls):
        raise RecipeError(f"{_path(cls)} cannot have the word {word!r}, which is that of {taken}. Choose another word.")
    PASSES.replace(cls)
    return cls


@contextmanager
def temporarily_registered(classes: Iterable[type[Pass]]) -> Iterator[None]:
    """Register passes within a `with` block; the registry is restored at its end."""
    with PASSES.restored():
        for cls in classes:
            register(cls)
        yield


def find_pass(word: str) -> type[Pass]:
    """Return the pass with a word.

    Raises:
        RecipeError: there is none, or it cannot be imported.
    """
    return PASSES.get(word)


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
