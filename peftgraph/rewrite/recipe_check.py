"""Checks a recipe before the passes are imported, and torch with them: words, options and the kinds of their values.

What is refused here is what reading the recipe would refuse, with the same message. A pass whose source does not say
its options plainly, or that was registered in this process, is checked when the recipe is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from peftgraph.errors import PeftGraphError, RecipeError
from peftgraph.rewrite.declared_options import PassWithin, declared_options
from peftgraph.rewrite.option_text import convert_options, require_given
from peftgraph.rewrite.options import plain, word_problem
from peftgraph.rewrite.recipe_text import PassText, read_recipe, read_specs
from peftgraph.rewrite.registry import PASSES
from peftgraph.sites.patterns.pattern import Pattern


def check_recipe(text: str) -> None:
    """Refuse a recipe with a mistake that can be seen without its passes.

    Args:
        text: the path of a file, or the text of specs.

    Raises:
        RecipeError: it cannot be read, or a word, an option or a value is wrong.
    """
    recipe = read_recipe(text)
    for one in recipe.passes:
        with one.located():
            _check(one, recipe.patterns)


def check_options(word: str, options: Mapping[str, Any]) -> None:
    """Refuse the options of a pass, given as values, as `check_recipe` does.

    Raises:
        RecipeError: a word, an option or a value is wrong.
    """
    _check(PassText(word, options), MappingProxyType({}))


def _check(one: PassText, patterns: Mapping[str, Pattern]) -> None:
    place = PASSES.entry_point(one.word)
    declared = None if place is None else declared_options(*place)
    if declared is None:
        return

    def nested(kind: type) -> Callable[[Any], object] | None:
        return (lambda raw: _check_nested(raw, patterns)) if kind is PassWithin else None

    values = convert_options(one.word, one.options, declared.types, nested, patterns)
    require_given(one.word, values, declared.required)
    for name, value in values.items():
        try:
            kept = plain(value, declared.types[name])
        except PeftGraphError:
            raise
        except ValueError as error:
            raise RecipeError(f"{one.word}: option {name!r} cannot be {value!r}: {error}.") from None
        problem = word_problem(name, kept, declared.types[name])
        if problem is not None:
            raise RecipeError(f"{one.word}: {problem}")


def _check_nested(raw: object, patterns: Mapping[str, Pattern]) -> PassWithin:
    for word, options in read_specs(str(raw)):
        _check(PassText(word, options), patterns)
    return PassWithin()
