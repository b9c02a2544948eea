"""The text of patterns, by recursive descent.

statements := statement ((";" | newline) statement)*
statement := NAME "=" term | quantity RELATION quantity
term      := choice ("|" choice)*                  choice := prefix (":" TAG)?       prefix := "~" prefix | suffixed
suffixed  := primary ("[" NUMBER? ":" NUMBER? "]")?
primary   := "(" term ")" | LITERAL | NAME "?"? "(" arguments ")" | NAME
quantity  := NUMBER | (NUMBER "*")? "size" "(" NAME "," NUMBER ")"
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, NoReturn

from peftgraph.errors import PeftGraphError, pointed, shortened
from peftgraph.sites.patterns.conditions import RELATIONS, Condition, Quantity
from peftgraph.sites.patterns.terms import (
    Call,
    Constant,
    Either,
    Literal,
    Scalar,
    Term,
    Through,
    Var,
    Window,
    Word,
    read_texts_with,
)

DEPTH: Final = 64  # brackets and ~ within one another
DIGITS: Final = 18  # of a whole number
TERMS: Final = 10_000  # words and marks of a pattern
TOKEN: Final = re.compile(
    r"(?P<line>[ \t\r]*\n)|[ \t\r]*(?:(?P<name>[A-Za-z_]\w*)"
    r"|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<string>'[^'\n\"\\]*')"
    r"|(?P<mark>==|!=|<=|>=|[<>=;,()\[\]:|~?*]))"
)
WORDS: Final = ("_", "weight", "number")
CONSTANTS: Final[dict[str, Scalar]] = {"true": True, "false": False, "none": None}

Statement = tuple[str, Term] | Condition


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    at: int


def parse_term(text: str) -> Term:
    """Return the term that a text spells; the inverse of `str(term)`.

    Raises:
        PeftGraphError: the text cannot be read; the message shows the place.
    """
    parser = Parser(text)
    found = parser.term()
    parser.finish()
    return found


def parse_statements(text: str) -> list[Statement]:
    """Return the equations and conditions of a text, in its order."""
    parser = Parser(text)
    found = parser.statements()
    parser.finish()
    return found


class Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = self.nested = 0
        if not isinstance(text, str):
            raise PeftGraphError(f"a pattern is text, not {type(text).__name__}")
        self.tokens = list(self._tokens())
        if len(self.tokens) > TERMS:
            self._fail(self.tokens[TERMS], f"more than {TERMS} words and marks")

    def _tokens(self) -> list[Token]:
        tokens: list[Token] = []
        at, text = 0, self.text.rstrip()
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                start = at + len(text[at:]) - len(text[at:].lstrip())
                self._fail(Token("", text[start], start), f"cannot read {text[start]!r}")
            kind = str(match.lastgroup)
            tokens.append(Token(kind, "\n" if kind == "line" else match.group(kind), match.start(kind)))
            at = match.end()
        return [*tokens, Token("end", "the end", len(text))]

    def _fail(self, token: Token, problem: str) -> NoReturn:
        raise PeftGraphError(f"cannot read the pattern: {shortened(problem)}\n{pointed(self.text, token.at)}")

    def _peek(self) -> Token:
        """Return the next token; inside brackets a line's end is no more than a space."""
        while self.depth and self.tokens[self.at].kind == "line":
            self.at += 1
        return self.tokens[self.at]

    def _take(self) -> Token:
        token = self._peek()
        if token.kind != "end":
            self.at += 1
        return token

    def _takes(self, text: str) -> bool:
        if self._peek().text == text and self._peek().kind == "mark":
            self.at += 1
            return True
        return False

    def _name(self, what: str) -> str:
        token = self._take()
        if token.kind != "name":
            self._fail(token, f"expected {what}, found {_shown(token)}")
        return token.text

    def expect(self, text: str) -> None:
        token = self._take()
        if token.text != text:
            self._fail(token, f"expected {text!r}, found {_shown(token)}")

    def finish(self) -> None:
        self._skip_separators()
        if self._peek().kind != "end":
            self._fail(self._peek(), f"did not expect {_shown(self._peek())} here")

    def _skip_separators(self) -> bool:
        start = self.at
        while self._peek().text in (";", "\n"):
            self.at += 1
        return self.at > start

    def statements(self) -> list[Statement]:
        self._skip_separators()
        found = [self._statement()]
        while self._skip_separators() and self._peek().kind != "end":
            found.append(self._statement())
        return found

    def _statement(self) -> Statement:
        token = self._peek()
        if token.kind == "number" or token.text == "size":
            return self._condition()
        name = self._name("an equation (name = ...) or a condition (size(name, axis) == ...)")
        if self._peek().text != "=":
            self._fail(token, f"expected an equation, {name} = ..., or a condition")
        self._take()
        return Var(name).name, self.term()

    def _condition(self) -> Condition:
        left = self._quantity()
        token = self._take()
        if token.text not in RELATIONS:
            self._fail(token, f"expected one of {' '.join(RELATIONS)}, found {_shown(token)}")
        return Condition(left, token.text, self._quantity())

    def _quantity(self) -> Quantity:
        factor: int | float = 1
        if self._peek().kind == "number":
            factor = self._number(self._take())
            if not self._takes("*"):
                return Quantity(factor)
        self.expect("size")
        self.expect("(")
        variable = self._name("the name of a value")
        self.expect(",")
        axis = self._integer()
        self.expect(")")
        return Quantity(factor, variable, axis)

    def _number(self, token: Token) -> int | float:
        if token.text.lstrip("-").isdigit():
            return self._whole(token)
        value = float(token.text)
        if not math.isfinite(value):
            self._fail(token, "a number that is larger than any")
        return value

    def _whole(self, token: Token) -> int:
        if len(token.text) > DIGITS:
            self._fail(token, f"a number of {len(token.text)} digits")
        return int(token.text)

    def _integer(self) -> int:
        token = self._take()
        if token.kind != "number" or not token.text.lstrip("-").isdigit():
            self._fail(token, f"expected a whole number, found {_shown(token)}")
        return self._whole(token)

    def term(self) -> Term:
        choices = [self._choice()]
        while self._takes("|"):
            choices.append(self._choice())
        if len(choices) == 1 and not choices[0][1]:
            return choices[0][0]
        return Either(tuple(choices))

    def _choice(self) -> tuple[Term, str]:
        term = self._prefix()
        return term, self._name("a tag") if self._takes(":") else ""

    def _prefix(self) -> Term:
        self.nested += 1
        if self.nested > DEPTH:
            self._fail(self._peek(), f"more than {DEPTH} brackets and ~ within one another")
        found = Through(self._prefix()) if self._takes("~") else self._suffixed()
        self.nested -= 1
        return found

    def _suffixed(self) -> Term:
        found = self._primary()
        if not self._takes("["):
            return found
        token = self._peek()
        start = 0 if token.text == ":" else self._integer()
        self.expect(":")
        stop = None if self._peek().text == "]" else self._integer()
        self.expect("]")
        try:
            return Window(found, start, stop)
        except PeftGraphError as problem:
            self._fail(token, str(problem))

    def _primary(self) -> Term:
        token = self._take()
        if token.text == "(" and token.kind == "mark":
            self.depth += 1
            found = self.term()
            self.expect(")")
            self.depth -= 1
            return found
        if token.kind != "name" or token.text in CONSTANTS:
            self.at -= token.kind != "end"
            return Literal(self._literal())
        optional = self._takes("?")
        if self._takes("("):
            return self._call(token, optional)
        if optional:
            self._fail(token, f"only an operator is optional: {token.text}?(...)")
        if token.text in WORDS:
            return Word(token.text)
        if token.text in ("size", "where"):
            self._fail(token, f"{token.text!r} is a reserved word")
        return Var(token.text)

    def _call(self, head: Token, optional: bool) -> Call:
        self.depth += 1
        args: list[Term] = []
        options: list[tuple[str, Constant]] = []
        while not self._takes(")"):
            if args or options:
                self.expect(",")
            here = self._peek()
            if here.kind == "name" and self.tokens[self.at + 1].text == "=":
                self.at += 2
                options.append((here.text, self._literal()))
            elif options:
                self._fail(here, "a term cannot follow name=value")
            else:
                args.append(self.term())
        self.depth -= 1
        if optional and not args:
            self._fail(head, f"an optional operator needs the value that may stand without it: {head.text}?(x)")
        return Call(head.text, tuple(args), tuple(options), optional)

    def _literal(self) -> Constant:
        if not self._takes("["):
            return self._scalar()
        found: list[Scalar] = []
        while not self._takes("]"):
            if found:
                self.expect(",")
            found.append(self._scalar())
        return tuple(found)

    def _scalar(self) -> Scalar:
        token = self._take()
        if token.kind == "number":
            return self._number(token)
        if token.kind == "string":
            return token.text[1:-1]
        if token.text not in CONSTANTS:
            self._fail(token, f"expected a value or a term, found {_shown(token)}")
        return CONSTANTS[token.text]


def _shown(token: Token) -> str:
    return {"end": "the end", "line": "the end of the line"}.get(token.kind, repr(token.text))


read_texts_with(parse_term)
