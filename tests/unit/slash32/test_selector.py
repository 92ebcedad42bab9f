# The selector language of design section 7: hand-written tables, a naive second reading, and garbage.
from __future__ import annotations

import random
import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slash32.selector import MAX_DEPTH, MAX_LENGTH, SelectorError, parse

CANONICAL = [
    ("", "all()"),
    ("  \t ", "all()"),
    ("all()", "all()"),
    ("all( \t)", "all()"),
    ("global()", "global()"),
    ("global(  )", "global()"),
    ("has(x)", "has(x)"),
    ("has( x\t)", "has(x)"),
    ("!has(x)", "!has(x)"),
    ("! has(x)", "!has(x)"),
    ("!!has(x)", "has(x)"),
    ("! ! !has(x)", "!has(x)"),
    ("!(!has(x))", "has(x)"),
    ("!((!(a == 'b')))", 'a == "b"'),
    ("!a == 'b'", '!a == "b"'),
    ("a == 'b'", 'a == "b"'),
    ('a=="b"', 'a == "b"'),
    ('a!="b"', 'a != "b"'),
    ("a == ''", 'a == ""'),
    ("a == 'say \"hi\"'", "a == 'say \"hi\"'"),
    ('a == "it\'s"', 'a == "it\'s"'),
    ('a == "\\"', 'a == "\\"'),  # no escapes
    ('a == "two\nlines"', 'a == "two\nlines"'),  # any character within the quotes
    ('a == "é"', 'a == "é"'),
    ('a contains "b"', 'a contains "b"'),
    ('a contains"b"', 'a contains "b"'),
    ('a starts with "b"', 'a starts with "b"'),
    ('a startswith"b"', 'a starts with "b"'),
    ('a ends \t  with "b"', 'a ends with "b"'),
    ('a endswith "b"', 'a ends with "b"'),
    ('a in {"x", "y"}', 'a in {"x", "y"}'),
    ('a in{"y","x","y"}', 'a in {"x", "y"}'),
    ('a in {"x",}', 'a in {"x"}'),
    ("a in {}", "a in {}"),
    ("a in { }", "a in {}"),
    ("a notin {'x'}", 'a not in {"x"}'),
    ("a not in{ 'x' , }", 'a not in {"x"}'),
    ("a not\tin {}", "a not in {}"),
    ("in in {'in'}", 'in in {"in"}'),
    ("not == 'x'", 'not == "x"'),
    ("not not in {'x'}", 'not not in {"x"}'),
    ("has == 'x'", 'has == "x"'),
    ("has(has)", "has(has)"),
    ("all != 'x'", 'all != "x"'),
    ("contains contains 'x'", 'contains contains "x"'),
    ("starts starts with 'x'", 'starts starts with "x"'),
    ("a.b/c-d_E9 == 'x'", 'a.b/c-d_E9 == "x"'),
    ("-/. == 'x'", '-/. == "x"'),
    ("a == 'b' && c == 'd'", '(a == "b" && c == "d")'),
    ("a == 'b' || c == 'd'", '(a == "b" || c == "d")'),
    ("a == 'b'&&c == 'd'||has(e)", '((a == "b" && c == "d") || has(e))'),
    ("has(a) || has(b) && has(c)", "(has(a) || (has(b) && has(c)))"),
    ("(has(a) || has(b)) && has(c)", "((has(a) || has(b)) && has(c))"),
    ("has(a) && has(b) && has(c)", "(has(a) && has(b) && has(c))"),
    ("(has(a) && has(b)) && has(c)", "((has(a) && has(b)) && has(c))"),
    ("((((has(a)))))", "has(a)"),
    ("!(has(a) && has(b))", "!(has(a) && has(b))"),
    ("!has(a) && has(b)", "(!has(a) && has(b))"),
    ("!(has(a)) || !(has(b))", "(!has(a) || !has(b))"),
    ("x" * 512 + " == 'y'", "x" * 512 + ' == "y"'),
]

# text, the column of the complaint (from 1)
ERRORS = [
    ("a = 'b'", 3),
    ("a == b", 6),
    ("a == 'b' & c == 'd'", 10),
    ("a == 'b' | c == 'd'", 10),
    ("a", 2),
    ("role", 5),
    ("a == 'b", 6),
    ('a == "b', 6),
    ("a == 'b' c == 'd'", 10),
    ("a == 'b' 'c'", 10),
    ("a ==", 5),
    ("== 'b'", 1),
    ("'a' == 'b'", 1),
    ("has (x)", 5),
    ("all ()", 5),
    ("global ()", 8),
    ("has()", 5),
    ("has(x", 6),
    ("has('x')", 5),
    ("has(x, y)", 6),
    ("all(x)", 5),
    ("all(", 5),
    ("all", 4),
    ("Has(x)", 4),
    ("a in {,}", 7),
    ("a in {'x',,}", 11),
    ("a in {'x' 'y'}", 11),
    ("a in {x}", 7),
    ("a in {'x'", 10),
    ("a in 'x'", 6),
    ("a in ['x']", 6),
    ("a inn {'x'}", 3),
    ("a in_ {'x'}", 3),
    ("a in9{'x'}", 3),
    ("a not inx {'x'}", 3),
    ("a not {'x'}", 3),
    ("a startswithx 'x'", 3),
    ("a starts 'x'", 3),
    ("a containsx 'x'", 3),
    ("a CONTAINS 'x'", 3),
    ("a contains {'x'}", 12),
    ("a == {'x'}", 6),
    ("a\n== 'b'", 2),
    ("\na == 'b'", 1),
    ("a == 'b'\n", 9),
    ("a == 'b' \r", 10),
    ("a\u00a0== 'b'", 2),
    ("é == 'b'", 1),
    ("()", 2),
    ("(has(a)", 1),
    ("has(a))", 7),
    ("(has(a)))", 9),
    ("has(a) &&", 10),
    ("has(a) ||", 10),
    ("&& has(a)", 1),
    ("has(a) && || has(b)", 11),
    ("has(a) &&& has(b)", 10),
    ("!", 2),
    ("!()", 3),
    ("!= 'x'", 1),
    ("!!= 'x'", 2),
    ("a !== 'b'", 5),
    ("a ! = 'b'", 3),
    ("a !in {'b'}", 3),
    ("has(a) has(b)", 8),
    ("has(a) in {'b'}", 8),
    ("(a) == 'b'", 3),
    ("a == 'b' all()", 10),
    ("{'a'}", 1),
    ("a == 'b';", 9),
    ("x" * 513 + " == 'y'", 1),
    ("has(" + "x" * 513 + ")", 5),
    ("a == '\ud800'", 7),
]

LABELS = {"a": "b", "role": "web-front", "empty": ""}
MATCHES = [
    ("", True),
    ("all()", True),
    ("global()", True),
    ("!all()", False),
    ("has(a)", True),
    ("has(A)", False),
    ("has(empty)", True),
    ("!has(zz)", True),
    ("a == 'b'", True),
    ("a == 'B'", False),
    ("zz == ''", False),
    ("empty == ''", True),
    ("a != 'b'", False),
    ("a != 'c'", True),
    ("zz != 'c'", True),  # holds where the label is missing
    ("!zz == 'c'", True),
    ("!zz != 'c'", False),
    ("a in {'x', 'b'}", True),
    ("a in {}", False),
    ("zz in {''}", False),
    ("a not in {'x'}", True),
    ("a not in {'b'}", False),
    ("zz not in {'x'}", True),  # holds where the label is missing
    ("zz not in {}", True),
    ("a not in {}", True),
    ("role contains 'b-f'", True),
    ("role contains ''", True),
    ("zz contains ''", False),
    ("role starts with 'web'", True),
    ("role starts with 'front'", False),
    ("zz starts with ''", False),
    ("role ends with 'front'", True),
    ("role ends with 'web'", False),
    ("zz ends with ''", False),
    ("a == 'b' && role contains 'web'", True),
    ("a == 'b' && has(zz)", False),
    ("has(zz) || a == 'b'", True),
    ("has(zz) && has(zz) || a == 'b'", True),  # && binds tighter
    ("has(zz) && (has(zz) || a == 'b')", False),
    ("!has(zz) && has(a)", True),  # ! binds to one operation
    ("!(has(zz) || has(a))", False),
]


@pytest.mark.parametrize(("text", "canonical"), CANONICAL)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert str(parse(canonical)) == canonical
    assert parse(text) == parse(canonical)
    assert hash(parse(text)) == hash(parse(canonical))


@pytest.mark.parametrize(("text", "column"), ERRORS)
def test_errors_name_the_column_on_one_line(text: str, column: int) -> None:
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert caught.value.column == column, str(caught.value)
    assert caught.value.text == text
    line = str(caught.value)
    assert line.isprintable() and f"column {column}:" in line
    line.encode()


@pytest.mark.parametrize(("text", "expected"), MATCHES)
def test_matches(text: str, expected: bool) -> None:
    assert parse(text).matches(LABELS) is expected


def test_uses_global() -> None:
    assert parse("a == 'b' && !global()").uses_global()
    assert not parse("global == 'x' && has(global) && a == 'global()'").uses_global()


def test_not_equal_to_other_selectors_or_types() -> None:
    assert parse("has(a)") != parse("has(b)")
    assert parse("has(a)") != "has(a)"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000,
        "!" * 10_000,
        "(" * 10_000 + "all()" + ")" * 10_000,
        "!" * 10_000 + "all()",
        "!(" * 3_000 + "all()" + ")" * 3_000,
        "(" * (MAX_DEPTH + 1) + "all()" + ")" * (MAX_DEPTH + 1),
        "(" * 4_000,
        "has(a)||" * 1_100,
        "x" * (MAX_LENGTH + 1),
        "a in {" + "'x'," * 3_000,
        "a in{" + ",".join(f"'{n}'" for n in range(1_250)) + "}",  # only the canonical form is too long
    ],
)
def test_hostile_text_is_a_selector_error(text: str) -> None:
    with pytest.raises(SelectorError) as caught:
        parse(text)
    assert len(str(caught.value)) < 400


def test_the_deepest_tree_parses_prints_and_matches() -> None:
    half = MAX_DEPTH // 2  # each turn is an || and an &&
    text = "(has(a)||has(b)&&!" * half + "has(c)" + ")" * half
    selector = parse(text)
    assert parse(str(selector)) == selector
    assert selector.matches({"a": ""})
    with pytest.raises(SelectorError, match="deeper"):
        parse(f"has(x)||has(y)&&!{text}")
    assert parse("(" * MAX_DEPTH + "all()" + ")" * MAX_DEPTH) == parse("")
    assert parse("!" * 5_000 + "has(x)") == parse("has(x)")


# --- generated selectors: written with odd spacing, judged by a second, naive reading of the same tree

Tree = tuple[object, ...]
KEYS = ["a", "b", "role", "in", "not", "has", "x.y/z"]
VALUES = ["", "a", "b", "web", "web-1", "it's", 'q"q', "é"]
leaves = st.one_of(
    st.just(("all",)),
    st.tuples(st.just("has"), st.sampled_from(KEYS)),
    st.tuples(
        st.sampled_from(["==", "!=", "contains", "starts with", "ends with"]),
        st.sampled_from(KEYS),
        st.sampled_from(VALUES),
    ),
    st.tuples(
        st.sampled_from(["in", "not in"]),
        st.sampled_from(KEYS),
        st.lists(st.sampled_from(VALUES), max_size=4).map(tuple),
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.sampled_from(["&&", "||"]), st.lists(inner, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=12,
)
label_maps = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES))


def write(tree: Tree, rng: random.Random) -> str:
    def ws(least: str = "") -> str:
        return least + rng.choice(["", " ", "\t", "  "])

    def lit(value: str) -> str:
        quotes = [q for q in "\"'" if q not in value]
        quote = rng.choice(quotes)
        return f"{quote}{value}{quote}"

    kind = tree[0]
    if kind == "all":
        return f"all({ws()})"
    if kind == "has":
        return f"has({ws()}{tree[1]}{ws()})"
    if kind == "not":
        return f"!{ws()}({ws()}{write(tree[1], rng)}{ws()})"  # type: ignore[arg-type]
    if kind in ("&&", "||"):
        parts = [f"({write(t, rng)})" for t in tree[1]]  # type: ignore[attr-defined]
        return f"{ws()}{kind}{ws()}".join(parts)
    operator = str(kind).replace(" ", ws())
    if kind in ("in", "not in"):
        body = f"{ws()},{ws()}".join(lit(v) for v in tree[2])  # type: ignore[attr-defined]
        comma = rng.choice(["", ","]) if tree[2] else ""
        return f"{tree[1]}{ws(' ')}{operator}{ws()}{{{ws()}{body}{ws()}{comma}{ws()}}}"
    return f"{tree[1]}{ws(' ')}{operator}{ws()}{lit(str(tree[2]))}"


def naive(tree: Tree, labels: Mapping[str, str]) -> bool:
    kind = tree[0]
    if kind == "all":
        return True
    if kind == "not":
        return not naive(tree[1], labels)  # type: ignore[arg-type]
    if kind == "&&":
        return all(naive(t, labels) for t in tree[1])  # type: ignore[attr-defined]
    if kind == "||":
        return any(naive(t, labels) for t in tree[1])  # type: ignore[attr-defined]
    if tree[1] not in labels:
        return kind in ("!=", "not in")
    have = labels[str(tree[1])]
    if kind == "has":
        return True
    if kind in ("in", "not in"):
        return (list(tree[2]).count(have) > 0) == (kind == "in")  # type: ignore[call-overload]
    wanted = re.escape(str(tree[2]))
    patterns = {"contains": f".*{wanted}.*", "starts with": f"{wanted}.*", "ends with": f".*{wanted}"}
    return (re.fullmatch(patterns.get(str(kind), wanted), have) is not None) != (kind == "!=")


@given(trees, label_maps, st.integers(0, 2**32))
@settings(max_examples=400, deadline=None)
def test_generated_selectors_agree_with_the_naive_reading(tree: Tree, labels: dict[str, str], seed: int) -> None:
    selector = parse(write(tree, random.Random(seed)))
    assert selector.matches(labels) is naive(tree, labels)
    again = parse(str(selector))
    assert again == selector and str(again) == str(selector)
    assert again.matches(labels) is selector.matches(labels)


@given(st.text(alphabet="ab \t'\"!=&|(){},.inothasl\n\u00e9", max_size=40) | st.text(max_size=40))
@settings(max_examples=1500, deadline=None)
def test_garbage_is_a_selector_or_a_selector_error(text: str) -> None:
    try:
        selector = parse(text)
    except SelectorError as error:
        assert 1 <= error.column <= len(text) + 1
        assert str(error).isprintable()
    else:
        assert parse(str(selector)) == selector
