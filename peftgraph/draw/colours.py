"""Colours of passes: one for each, or one for each pass inside of it, and what the legend says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

COLOURS = 5  # that the style sheet has


@dataclass(frozen=True)
class Part:
    """What has one colour: a pass, or a pass inside another.

    Attributes:
        text: its spec.
        first: the index of its first rule.
        rules: how many it has.
    """

    text: str
    first: int
    rules: int


def parts_of(method: Any) -> tuple[str, list[Part]]:
    """Return the spec of a pass around its inner passes, "" where it has none, and its parts.

    A pass has parts where an option holds several passes whose rules, in order, are its own.
    """
    rules = len(method.rules())
    for item in dataclasses.fields(method):
        inner = getattr(method, item.name)
        if not isinstance(inner, tuple) or len(inner) < 2 or not all(hasattr(one, "rules") for one in inner):
            continue
        counts = [len(one.rules()) for one in inner]
        if sum(counts) != rules:
            continue
        starts = [sum(counts[:i]) for i in range(len(counts))]
        parts = [Part(str(one), *place) for one, *place in zip(inner, starts, counts, strict=True)]
        spec = str(method).replace(f"[{', '.join(part.text for part in parts)}]", f"[{len(parts)} below]")
        return spec, parts
    return "", [Part(str(method), 0, rules)]


class Colours:
    """The CSS classes of the colours of some passes.

    Args:
        methods: application -> pass, of the passes that are shown.
    """

    def __init__(self, methods: Mapping[int, Any]) -> None:
        self._parts = {application: parts_of(method) for application, method in methods.items()}
        keys = [(application, i) for application, (_, parts) in self._parts.items() for i in range(len(parts))]
        self._css = {key: f"p{place % COLOURS}" for place, key in enumerate(keys)}

    def __contains__(self, application: object) -> bool:
        return application in self._parts

    def of(self, application: int, rule: int) -> str:
        """Return the CSS class of what a rule of a pass makes."""
        parts = self._parts[application][1]
        inside = (i for i, part in enumerate(parts) if part.first <= rule < part.first + part.rules)
        return self._css[application, next(inside, 0)]

    def legend(self) -> Iterator[tuple[str, str]]:
        """Yield (CSS class, spec): of every part, and with no class before the parts of a pass the pass itself."""
        for application, (spec, parts) in self._parts.items():
            if spec:
                yield "", spec
            for i, part in enumerate(parts):
                yield self._css[application, i], part.text
