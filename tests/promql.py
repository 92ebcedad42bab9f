# Owns: enough of PromQL to say which series, labels and label values a query names. Pure. It does not judge types.
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple

_TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<range>\[[^\]]*\])
      | (?P<number>[0-9][0-9.]*(?:e[+-]?[0-9]+)?)
      | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
      | (?P<operator>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){},])
      | (?P<space>\s+)""",
    re.X,
)
_FUNCTIONS = {"rate", "increase", "changes", "histogram_quantile", "absent", "vector", "label_values"}
_AGGREGATES = {"sum", "count", "max", "min", "avg", "topk"}
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset"}
_RANGE = re.compile(r"\[([0-9]+[smhd]|\$__rate_interval)\]")
_TARGETS = {"job", "instance"}  # Prometheus's own, on all
OWN = {"up": frozenset[str]()}  # and its own series


class Matcher(NamedTuple):
    label: str
    operator: str
    value: str


class Named(NamedTuple):
    """What a query names."""

    series: tuple[tuple[str, tuple[Matcher, ...]], ...]
    grouped: frozenset[str]  # labels in by (...), on (...) and the like
    rated: frozenset[str]  # series of which a rate is taken


class PromqlError(ValueError):
    """One line."""


def tokens(query: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(query):
        found = _TOKEN.match(query, at)
        if not found:
            raise PromqlError(f"what is {query[at:at + 20]!r}?")
        if found.lastgroup != "space":
            yield str(found.lastgroup), found[0]
        at = found.end()


def named(query: str) -> Named:
    """Raises PromqlError."""
    given = [*tokens(query), ("end", "")]
    if [t for _, t in given].count("(") != [t for _, t in given].count(")"):
        raise PromqlError("brackets do not match")
    series: list[tuple[str, tuple[Matcher, ...]]] = []
    grouped: set[str] = set()
    rated: set[str] = set()
    at = 0
    while at < len(given) - 1:
        kind, text = given[at]
        at += 1
        if kind == "range" and not (_RANGE.fullmatch(text) and series):
            raise PromqlError(f"{text} is no range")
        if kind == "range":
            rated.add(series[-1][0])
        if kind != "name" or text in _WORDS:
            continue
        following = given[at][1]
        if text in _GROUPING:
            labels, at = _labels(given, at)
            grouped |= labels
        elif text in _FUNCTIONS | _AGGREGATES:
            if following != "(" and following not in _GROUPING:
                raise PromqlError(f"{text} of what?")
        elif following == "(":
            raise PromqlError(f"{text} is no function")
        else:
            matchers, at = _matchers(given, at)
            series.append((text, matchers))
    return Named(tuple(series), frozenset(grouped), frozenset(rated))


def _labels(given: list[tuple[str, str]], at: int) -> tuple[set[str], int]:
    if given[at][1] != "(":
        raise PromqlError("by what?")
    end = next(n for n in range(at, len(given)) if given[n][1] in (")", ""))
    return {text for kind, text in given[at:end] if kind == "name"}, end + 1


def _matchers(given: list[tuple[str, str]], at: int) -> tuple[tuple[Matcher, ...], int]:
    found: list[Matcher] = []
    if given[at][1] != "{":
        return (), at
    at += 1
    while given[at][1] != "}":
        (kind, label), (_, operator), (of, value) = given[at : at + 3]
        if kind != "name" or operator not in ("=", "!=", "=~", "!~") or of != "string":
            raise PromqlError(f"{label} {operator} {value} is no matcher")
        found.append(Matcher(label, operator, value[1:-1]))
        at += 3
        if given[at][1] == ",":
            at += 1
    return tuple(found), at + 1


def faults(
    query: str, series: Mapping[str, frozenset[str]], known: Mapping[tuple[str, str], Set[str]], counters: Set[str]
) -> list[str]:
    """What the query names that is not there. `known`: by series and label, all the values that there can be."""
    try:
        found = named(query)
    except PromqlError as error:
        return [str(error)]
    problems = [] if found.series else ["it names no series"]
    have = series | OWN
    labels = set(_TARGETS)
    for name, matchers in found.series:
        if name not in have:
            problems.append(f"{name} is not exported")
            continue
        labels |= have[name]
        for label, operator, value in matchers:
            if label not in have[name] | _TARGETS:
                problems.append(f"{name} has no label {label}")
            elif operator == "=" and value not in known.get((name, label), {value}):
                problems.append(f'{name} never has {label}="{value}"')
    problems += [f"nothing here has a label {label}" for label in sorted(found.grouped - labels - {"le"})]
    if "le" in found.grouped and "le" not in labels:
        problems.append("nothing here has a label le")
    if "histogram_quantile" in query and "le" not in found.grouped:
        problems.append("a quantile without le")
    for name, _ in found.series:
        if (name in found.rated) != (name in counters):
            problems.append(f"{name}: counters have rates, and only they")
    return problems
