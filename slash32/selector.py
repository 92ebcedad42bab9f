# Owns: the label selector language (exactly Calico's): text -> Selector, its canonical form, its evaluation. Pure.
# The parser keeps its own stack, and depth and length are bounded: hostile text costs a SelectorError, nothing else.
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from slash32.errors import SelectorError, quoted

__all__ = ["MAX_DEPTH", "MAX_LENGTH", "Selector", "SelectorError", "parse"]

MAX_LENGTH = 8192  # characters; a policy's selector is held to fewer (slash32.resources)
MAX_DEPTH = 128  # parentheses within parentheses
MAX_LABEL = 512

Labels = Mapping[str, str]

_BLANK = re.compile(r"[ \t]*")
_LABEL = re.compile(r"[A-Za-z0-9_./-]+")
# Only the last word needs a boundary, and ASCII decides what is a word: `notin{` and `startswith"` are legal.
_OPERATOR = re.compile(r"==|!=|(?:contains|starts[ \t]*with|ends[ \t]*with|not[ \t]*in|in)(?![A-Za-z0-9_])")
_CALL = re.compile(r"(has|all|global)\([ \t]*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Node:
    __slots__ = ()

    def matches(self, labels: Labels) -> bool:
        raise NotImplementedError

    def render(self, out: list[str]) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class All(Node):
    name: str = "all"  # global() holds everywhere too

    def matches(self, labels: Labels) -> bool:
        return True

    def render(self, out: list[str]) -> None:
        out.append(f"{self.name}()")


@dataclass(frozen=True, slots=True, eq=False)
class Has(Node):
    label: str

    def matches(self, labels: Labels) -> bool:
        return self.label in labels

    def render(self, out: list[str]) -> None:
        out.append(f"has({self.label})")


@dataclass(frozen=True, slots=True, eq=False)
class Compare(Node):
    label: str
    operator: str  # "==", "!=", "contains", "starts with", "ends with"
    value: str

    def matches(self, labels: Labels) -> bool:
        have = labels.get(self.label)
        if have is None:
            return self.operator == "!="
        if self.operator == "==":
            return have == self.value
        if self.operator == "!=":
            return have != self.value
        if self.operator == "contains":
            return self.value in have
        return have.startswith(self.value) if self.operator == "starts with" else have.endswith(self.value)

    def render(self, out: list[str]) -> None:
        out.append(f"{self.label} {self.operator} {_literal(self.value)}")


@dataclass(frozen=True, slots=True, eq=False)
class InSet(Node):
    label: str
    negate: bool
    values: frozenset[str]

    def matches(self, labels: Labels) -> bool:
        have = labels.get(self.label)
        return (have is not None and have in self.values) is not self.negate

    def render(self, out: list[str]) -> None:
        listed = ", ".join(_literal(v) for v in sorted(self.values))
        out.append(f"{self.label} {'not in' if self.negate else 'in'} {{{listed}}}")


@dataclass(frozen=True, slots=True, eq=False)
class Not(Node):
    operand: Node

    def matches(self, labels: Labels) -> bool:
        return not self.operand.matches(labels)

    def render(self, out: list[str]) -> None:
        out.append("!")
        self.operand.render(out)


@dataclass(frozen=True, slots=True, eq=False)
class Several(Node):
    """Two or more operands joined by `&&` or `||`."""

    operator: str
    operands: tuple[Node, ...]

    def matches(self, labels: Labels) -> bool:
        decisive = self.operator == "||"
        for operand in self.operands:  # no generator: one Python frame for each level of the tree
            if operand.matches(labels) is decisive:
                return decisive
        return not decisive

    def render(self, out: list[str]) -> None:
        for index, operand in enumerate(self.operands):
            out.append(f" {self.operator} " if index else "(")
            operand.render(out)
        out.append(")")


class Selector:
    """A parsed selector. Equal when the canonical forms are; `str()` is the canonical form."""

    __slots__ = ("_global", "_root", "_text")

    def __init__(self, root: Node, uses_global: bool) -> None:
        out: list[str] = []
        root.render(out)
        self._root = root
        self._text = "".join(out)
        self._global = uses_global

    def matches(self, labels: Labels) -> bool:
        return self._root.matches(labels)

    @property
    def root(self) -> Node:
        """The parsed text, for those who keep selectors in an index."""
        return self._root

    def uses_global(self) -> bool:
        """Whether `global()` occurs anywhere: legal to parse, refused in policy."""
        return self._global

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Selector({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Selector) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)


def parse(text: str) -> Selector:
    """Raises SelectorError (with the column) for whatever is not a selector. "" and blanks mean all()."""
    if len(text) > MAX_LENGTH:
        raise SelectorError(text, MAX_LENGTH + 1, f"longer than {MAX_LENGTH} characters")
    lone = _SURROGATE.search(text)
    if lone:
        raise SelectorError(text, lone.start() + 1, "half of a surrogate pair is not a character")
    parser = _Parser(text)
    root = parser.selector()
    if _nesting(root) > MAX_DEPTH:
        raise SelectorError(text, 1, f"&& and || nest deeper than {MAX_DEPTH} levels")
    selector = Selector(root, parser.uses_global)
    if len(str(selector)) > MAX_LENGTH:  # whoever stores the canonical form must be able to read it again
        raise SelectorError(text, 1, f"longer than {MAX_LENGTH} characters in its canonical form")
    return selector


def _nesting(root: Node) -> int:
    """How many && and || enclose one another: the parentheses of the canonical form."""
    deepest = 0
    todo = [(root, 0)]
    while todo:
        node, depth = todo.pop()
        deepest = max(deepest, depth)
        if isinstance(node, Not):
            todo.append((node.operand, depth))
        elif isinstance(node, Several):
            todo.extend((operand, depth + 1) for operand in node.operands)
    return deepest


def _literal(value: str) -> str:
    return f"'{value}'" if '"' in value else f'"{value}"'


def _join(operator: str, operands: list[Node]) -> Node:
    return operands[0] if len(operands) == 1 else Several(operator, tuple(operands))


def _negated(node: Node) -> Node:
    """Two negations fold away, also across parentheses: the canonical form is one that parses to itself."""
    return node.operand if isinstance(node, Not) else Not(node)


@dataclass(slots=True)
class _Level:
    """One pair of parentheses (or the whole text): the terms read so far."""

    opened: int
    negate: bool = False
    ors: list[Node] = field(default_factory=list)
    ands: list[Node] = field(default_factory=list)

    def add(self, node: Node, negate: bool) -> None:
        self.ands.append(_negated(node) if negate else node)

    def close_and(self) -> None:
        self.ors.append(_join("&&", self.ands))
        self.ands = []

    def close(self) -> Node:
        self.close_and()
        return _join("||", self.ors)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.uses_global = False

    def selector(self) -> Node:
        self.blanks()
        if self.at == len(self.text):
            return All()
        levels = [_Level(0)]
        while True:
            self.operand(levels)
            while self.accept(")"):
                if len(levels) == 1:
                    self.fail("this ')' closes nothing", self.at - 1)
                inner = levels.pop()
                levels[-1].add(inner.close(), inner.negate)
            if self.accept("&&"):
                continue
            if self.accept("||"):
                levels[-1].close_and()
                continue
            return self.end(levels)

    def end(self, levels: list[_Level]) -> Node:
        if self.at < len(self.text):
            self.fail(f"expected &&, || or the end, not {self.here()}")
        if len(levels) > 1:
            self.fail("this '(' is never closed", levels[-1].opened)
        return levels[0].close()

    def operand(self, levels: list[_Level]) -> None:
        """`!` and `(` as many as there are, then one primary."""
        negate = False
        while True:
            self.blanks()
            if self.text.startswith("!=", self.at):
                self.fail("!= needs a label before it")
            if self.accept("!"):
                negate = not negate
            elif self.accept("("):
                if len(levels) > MAX_DEPTH:
                    self.fail(f"more than {MAX_DEPTH} parentheses within one another", self.at - 1)
                levels.append(_Level(self.at - 1, negate))
                negate = False
            else:
                levels[-1].add(self.primary(), negate)
                return

    def primary(self) -> Node:
        call = _CALL.match(self.text, self.at)
        if call:
            return self.call(call)
        label = self.label("a label, has(...), all(), '!' or '('")
        self.blanks()
        operator = _OPERATOR.match(self.text, self.at)
        if not operator:
            hint = " (equality is ==)" if self.text.startswith("=", self.at) else ""
            self.fail(f"expected an operator after label {quoted(label)}, not {self.here()}{hint}")
        self.at = operator.end()
        word = operator[0].replace(" ", "").replace("\t", "")
        if word in ("in", "notin"):
            return InSet(label, word == "notin", self.set_literal())
        self.blanks()
        spelled = {"startswith": "starts with", "endswith": "ends with"}.get(word, word)
        return Compare(label, spelled, self.string(f"a string in quotes after {spelled}"))

    def call(self, call: re.Match[str]) -> Node:
        name = call[1]
        self.at = call.end()
        node: Node = Has(self.label("a label in has(...)")) if name == "has" else All(name)
        self.uses_global = self.uses_global or name == "global"
        if not self.accept(")"):
            self.fail(f"expected ')' to end {name}(, not {self.here()}")
        return node

    def label(self, wanted: str) -> str:
        match = _LABEL.match(self.text, self.at)
        if not match:
            self.fail(f"expected {wanted}, not {self.here()}")
        if len(match[0]) > MAX_LABEL:
            self.fail(f"a label name has at most {MAX_LABEL} characters")
        self.at = match.end()
        return match[0]

    def string(self, wanted: str) -> str:
        quote = self.text[self.at : self.at + 1]
        if quote not in ('"', "'"):
            self.fail(f"expected {wanted}, not {self.here()}")
        end = self.text.find(quote, self.at + 1)
        if end < 0:
            self.fail("this string is never closed")
        value = self.text[self.at + 1 : end]
        self.at = end + 1
        return value

    def set_literal(self) -> frozenset[str]:
        if not self.accept("{"):
            self.fail(f"expected '{{' and a list of strings, not {self.here()}")
        values: set[str] = set()
        while not self.accept("}"):
            values.add(self.string("a string in quotes or '}'"))
            if not self.accept(",") and not self.peek("}"):
                self.fail(f"expected ',' or '}}' in a set, not {self.here()}")
            self.blanks()
        return frozenset(values)

    def blanks(self) -> None:
        match = _BLANK.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def peek(self, token: str) -> bool:
        self.blanks()
        return self.text.startswith(token, self.at)

    def accept(self, token: str) -> bool:
        if not self.peek(token):
            return False
        self.at += len(token)
        return True

    def here(self) -> str:
        return quoted(self.text[self.at], 1) if self.at < len(self.text) else "the end"

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        raise SelectorError(self.text, (self.at if at is None else at) + 1, message)
