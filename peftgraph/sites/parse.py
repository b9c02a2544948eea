"""A recursive-descent parser for selectors.

either := both ("|" both)*      both := prefix ("&" prefix)*      prefix := "~" prefix | suffixed
suffixed := primary (".where(path=" STRING ")")*                  primary := "(" either ")" | FILTER | ROLE | own
own := "pattern(" STRING ")" "." NAME | PATTERN "." NAME          where NAME may be "*"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn

from peftgraph.errors import PeftGraphError

from .select import (
    FILTERS,
    WORDS,
    Both,
    Either,
    Expert,
    Kind,
    Layers,
    Not,
    Selector,
    Stack,
    Where,
    role,
    suggestion,
)

if TYPE_CHECKING:
    from .patterns import Pattern

TOKEN: Final = re.compile(
    r"\s*(?:(?P<where>\.\s*where\b)|(?P<part>\.(?:\w+|\*))|(?P<word>[A-Za-z_]\w*(?:\.(?!where\b)(?:\w+|\*))*)"
    r"|(?P<number>-?\d+)|(?P<string>\"(?:\\\"|[^\"])*\"|'(?:\\'|[^'])*')|(?P<mark>[|&~(),=]))"
)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    at: int


class Parser:
    def __init__(self, text: str, patterns: Mapping[str, Pattern] = MappingProxyType({})) -> None:
        self.text = text
        self.patterns = patterns
        self.at = 0
        self.tokens = self._tokens()

    def parse(self) -> Selector:
        found = self._either()
        if self._peek().kind != "end":
            self._fail(self._peek(), f"did not expect {self._peek().text!r} here")
        return found

    def _tokens(self) -> list[Token]:
        tokens: list[Token] = []
        at = 0
        text = self.text.rstrip()
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                start = at + len(text[at:]) - len(text[at:].lstrip())
                self._fail(Token("", text[start], start), f"cannot read {text[start]!r}")
            kind = str(match.lastgroup)
            tokens.append(Token(kind, match.group(kind), match.start(kind)))
            at = match.end()
        return [*tokens, Token("end", "the end", len(text))]

    def _fail(self, token: Token, problem: str) -> NoReturn:
        words = ", ".join([*WORDS, *(f"{name}(...)" for name in FILTERS), '.where(path="...")'])
        raise PeftGraphError(
            f"cannot read the selector: {problem}\n  {self.text}\n  {' ' * token.at}^\nKnown words: {words}"
            + "".join(f", {name}.*" for name in self.patterns)
        )

    def _peek(self) -> Token:
        return self.tokens[self.at]

    def _take(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def _expect(self, text: str) -> Token:
        token = self._take()
        if token.text != text:
            self._fail(token, f"expected {text!r}, found {token.text!r}")
        return token

    def _either(self) -> Selector:
        left = self._both()
        while self._peek().text == "|":
            self._take()
            left = Either(left, self._both())
        return left

    def _both(self) -> Selector:
        left = self._prefix()
        while self._peek().text == "&":
            self._take()
            left = Both(left, self._prefix())
        return left

    def _prefix(self) -> Selector:
        if self._peek().text == "~":
            self._take()
            return Not(self._prefix())
        return self._suffixed()

    def _suffixed(self) -> Selector:
        found = self._primary()
        while self._peek().kind == "where":
            self._take()
            self._expect("(")
            self._expect("path")
            self._expect("=")
            found = Where(found, self._string())
            self._expect(")")
        return found

    def _primary(self) -> Selector:
        token = self._take()
        if token.text == "(" and token.kind == "mark":
            found = self._either()
            self._expect(")")
            return found
        if token.kind != "word":
            self._fail(token, f"expected a role or a filter, found {token.text!r}")
        if token.text in FILTERS and self._peek().text == "(":
            return self._filter(token.text)
        if token.text == "pattern" and self._peek().text == "(":
            return self._pattern()
        name = next((name for name in self.patterns if token.text == name or token.text.startswith(f"{name}.")), None)
        if name is not None:
            return self._part_of(self.patterns[name], token, token.text[len(name) + 1 :])
        if token.text not in WORDS:
            self._fail(token, f"unknown word {token.text!r}{suggestion(token.text)}")
        return role(token.text)

    def _pattern(self) -> Selector:
        """A pattern that stands in the selector itself, and the value of it that is meant."""
        from .patterns import Pattern

        self._expect("(")
        at = self._peek()
        try:
            pattern = Pattern.parse(self._string())
        except PeftGraphError as problem:
            self._fail(at, str(problem))
        self._expect(")")
        part = self._peek()
        return self._part_of(pattern, part, self._take().text[1:] if part.kind == "part" else "")

    def _part_of(self, pattern: Pattern, token: Token, part: str) -> Selector:
        try:
            return pattern[part]
        except PeftGraphError as problem:
            self._fail(token, str(problem))

    def _filter(self, name: str) -> Selector:
        self._expect("(")
        if name in ("stack", "kind"):
            text = self._string()
            self._expect(")")
            return Stack(text) if name == "stack" else Kind(text)
        start = self._number()
        stop = start + 1
        if name == "layers" and self._peek().text == ",":
            self._take()
            stop = self._number()
        self._expect(")")
        return Layers(start, stop) if name == "layers" else Expert(start)

    def _number(self) -> int:
        token = self._take()
        if token.kind != "number":
            self._fail(token, f"expected a number, found {token.text!r}")
        return int(token.text)

    def _string(self) -> str:
        token = self._take()
        if token.kind != "string":
            self._fail(token, f"expected text in quotes, found {token.text!r}")
        quote = token.text[0]
        return token.text[1:-1].replace(f"\\{quote}", quote)
