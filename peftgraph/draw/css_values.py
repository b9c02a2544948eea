"""Reads the style sheet of the drawings, in its light scheme: what a shape looks like, as plain colours and numbers.

Only what the sheet uses is known: classes, elements and descendants, custom properties, and `color-mix`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from peftgraph.draw.svg import style

Values = Mapping[str, str]
Element = tuple[str, frozenset[str]]  # its name, and its classes
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Rule:
    """What the style sheet says of the elements that a selector means.

    Attributes:
        steps: the elements from the outermost to the one that is meant, each as a name ("" for any) and classes.
        values: property -> value.
        weight: the rule with the larger one wins; of equal ones, the later.
    """

    steps: tuple[Element, ...]
    values: Values
    weight: tuple[int, int]

    def means(self, path: Sequence[Element]) -> bool:
        """Tell whether the rule is about the last element of a path from the root."""
        if not _fits(self.steps[-1], path[-1]):
            return False
        left = list(self.steps[:-1])
        for element in reversed(path[:-1]):
            if left and _fits(left[-1], element):
                left.pop()
        return not left


def _fits(wanted: Element, element: Element) -> bool:
    return wanted[0] in ("", element[0]) and wanted[1] <= element[1]


@cache
def rules() -> tuple[Rule, ...]:
    """Return the rules of the style sheet that hold in the light scheme, the strongest last."""
    sheet = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", style())
    found: list[Rule] = []
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", sheet):
        values = dict(re.findall(r"([\w-]+)\s*:\s*([^;]+)", body))
        for selector in selectors.split(","):
            parts = (re.fullmatch(r"([a-z]*)((?:\.[\w-]+)*)", word) for word in selector.split())
            steps = tuple((part[1], frozenset(part[2].split(".")[1:])) for part in parts if part is not None)
            weight = sum(len(classes) for _, classes in steps), sum(name != "" for name, _ in steps)
            found.append(Rule(steps, values, weight))
    return tuple(sorted(found, key=lambda rule: rule.weight))


@cache
def values_of(path: tuple[Element, ...]) -> Values:
    """Return the properties of the last element of a path; custom ones and those of text come from what is around."""
    found: dict[str, str] = {}
    for depth in range(1, len(path) + 1):
        inherited = {k: v for k, v in found.items() if k.startswith(("--", "font")) or path[depth - 1][0] == "tspan"}
        found = inherited
        for rule in rules():
            if rule.means(path[:depth]):
                found |= rule.values
    return {name: _resolved(value.strip(), found) for name, value in found.items() if not name.startswith("--")}


def _resolved(value: str, values: Values) -> str:
    """Return a value without references to custom properties."""
    for _ in range(8):
        value = re.sub(r"var\((--[\w-]+)\)", lambda found: values.get(found[1], "#000000").strip(), value)
    mixed = re.fullmatch(r"color-mix\(in srgb, (\S+) (\d+)%, (\S+)\)", value)
    if mixed is None:
        return value
    share = int(mixed[2]) / 100
    parts = (share * a + (1 - share) * b for a, b in zip(colour(mixed[1]), colour(mixed[3]), strict=True))
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def colour(text: str) -> Colour:
    """Return a hexadecimal colour as shares of red, green and blue."""
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
