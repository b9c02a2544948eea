"""Read the text of selectors, by recursive descent.

either := both ("|" both)*      both := prefix ("&" prefix)*      prefix := "~" prefix | suffixed
suffixed := primary (".where(" option ("," option)* ")")*
primary := "(" either ")" | FILTER | ROLE | own
own := "pattern(" STRING ")" "." NAME | PATTERN "." NAME          where NAME may be "*"
option := "path=" STRING | "shape=(" NUMBER ("," NUMBER)* [","] ")" | COMPARED "=" (NUMBER | STRING)
COMPARED := "out_features" | "in_features"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn

from peftgraph.errors import PeftGraphError, pointed, shortened
from peftgraph.sites.patterns.pattern import Pattern
from peftgraph.sites.roles import WORDS
from peftgraph.sites.selectors.filters import Expert, Kind, Layers, Stack, layers
from peftgraph.sites.selectors.module_names import hint_for_module_name
from peftgraph.sites.selectors.selector import FILTERS, Both, Either, Not, Selector, read_texts_with, role, suggestion
from peftgraph.sites.selectors.selector import as_selector as as_selector  # with this parser behind it

DEPTH: Final = 64  # brackets and ~ within one another
TERMS: Final = 200  # of a selector, which are matched one within the other
DIGITS: Final = 18  # of a number
OPTIONS: Final = ("path", "shape", "out_features", "in_features")
TOKEN: Final = re.compile(
    r"\s*(?:(?P<where>\.\s*where\b)|(?P<part>\.(?:\w+|\*))|(?P<word>[A-Za-z_]\w*(?:\.(?!where\b)(?:\w+|\*))*)"
    r"|(?P<number>-?\d+)|(?P<string>\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*')|(?P<mark>[|&~(),=]))",
    re.DOTALL,
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
        self.depth = 0
        self.tokens = self._tokens()
        marks = [token for token in self.tokens if token.text in ("|", "&", "~") or token.kind == "where"]
        if len(marks) > TERMS:
            self._fail(marks[TERMS], f"more than {TERMS} terms; split the pass, or use path= with a regular expression")

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
            f"cannot read the selector: {shortened(problem)}\n{pointed(self.text, token.at)}\nKnown words: {words}"
            + "".join(f", {name}.*" for name in self.patterns)
        )

    def _peek(self) -> Token:
        return self.tokens[self.at]

    def _take(self) -> Token:
        token = self.tokens[self.at]
        self.at += token.kind != "end"
        return token

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
        self.depth += 1
        if self.depth > DEPTH:
            self._fail(self._peek(), f"more than {DEPTH} brackets and ~ within one another")
        if self._peek().text == "~":
            self._take()
            found: Selector = Not(self._prefix())
        else:
            found = self._suffixed()
        self.depth -= 1
        return found

    def _suffixed(self) -> Selector:
        found = self._primary()
        while self._peek().kind == "where":
            self._take()
            found = self._where(found)
        return found

    def _where(self, inner: Selector) -> Selector:
        opening = self._expect("(")
        given: dict[str, Any] = {}
        while not given or self._peek().text == ",":
            if given:
                self._take()
            key = self._take()
            if key.text not in OPTIONS or key.text in given:
                self._fail(key, f"expected one of {', '.join(OPTIONS)}, each once; found {key.text!r}")
            self._expect("=")
            given[key.text] = self._option(key.text)
        self._expect(")")
        return self._made(opening, lambda: inner.where(**given))

    def _option(self, key: str) -> str | int | tuple[int, ...]:
        if key == "path":
            return self._string()
        if key == "shape":
            self._expect("(")
            sizes = [self._number()]
            while self._peek().text == ",":
                self._take()
                if self._peek().kind == "number":
                    sizes.append(self._number())
            self._expect(")")
            return tuple(sizes)
        return self._number() if self._peek().kind == "number" else self._string()

    def _made(self, token: Token, make: Callable[[], Selector]) -> Selector:
        try:
            return make()
        except PeftGraphError as problem:
            self._fail(token, str(problem))

    def _primary(self) -> Selector:
        token = self._take()
        if token.text == "(" and token.kind == "mark":
            found = self._either()
            self._expect(")")
            return found
        if token.kind != "word":
            names = '. Names of modules are written weight.where(path="...")' if ".*" in self.text else ""
            self._fail(token, f"expected a role or a filter, found {token.text!r}{names}")
        if token.text in FILTERS and self._peek().text == "(":
            return self._filter(token.text)
        if token.text == "pattern" and self._peek().text == "(":
            return self._pattern()
        name = next((name for name in self.patterns if token.text == name or token.text.startswith(f"{name}.")), None)
        if name is not None:
            return self._part_of(self.patterns[name], token, token.text[len(name) + 1 :])
        if token.text not in WORDS:
            word = shortened(token.text)
            self._fail(token, f"unknown word {token.text!r}{hint_for_module_name(word) or suggestion(word)}")
        return role(token.text)

    def _pattern(self) -> Selector:
        """Return a pattern that stands in the selector itself, and the value of it that is meant."""
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
        token = self._peek()
        start = self._number()
        if name == "layers" and self._peek().text == ",":
            self._take()
            ends = self._peek().text == "end"
            stop = None if ends and self._take() else self._number()
            self._expect(")")
            return self._made(token, lambda: Layers(start, stop))
        self._expect(")")
        return Expert(start) if name == "expert" else layers(start)

    def _number(self) -> int:
        token = self._take()
        if token.kind != "number":
            self._fail(token, f"expected a number, found {token.text!r}")
        if len(token.text) > DIGITS:
            self._fail(token, f"a number of {len(token.text)} digits")
        return int(token.text)

    def _string(self) -> str:
        token = self._take()
        if token.kind != "string":
            self._fail(token, f"expected text in quotes, found {token.text!r}")
        quote = token.text[0]
        return token.text[1:-1].replace(f"\\{quote}", quote)


def parse_selector(text: str, patterns: Mapping[str, Pattern] = MappingProxyType({})) -> Selector:
    """Read a selector from its text: the inverse of `str(selector)`.

    Args:
        text: such as "attention.q|ffn.*&layers(0,4)".
        patterns: the patterns that the text may call by name.

    Raises:
        PeftGraphError: it cannot be read; the message shows the place.
    """
    if not isinstance(text, str):
        raise PeftGraphError(f"a selector is an object like attention.q or its text, not {type(text).__name__}")
    if text.strip() == "all-linear":
        raise PeftGraphError("what peft calls all-linear is the selector linear: every projection but the head")
    return Parser(text, patterns).parse()


read_texts_with(parse_selector)
