# YAML text -> documents and back: scalars, lines, bombs and garbage.
from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slash32.documents import MAX_NODES, Document, dump_yaml
from slash32.errors import ResourceError
from slash32.resources import decode, load_yaml


def policy(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "GlobalNetworkPolicy", "metadata": {"name": "p"}, "spec": spec}


BAD_YAML = [
    ("a: [1, 2", "f.yaml:"),
    ("a: 1\nb:\n  c: 1\n  c: 2", 'f.yaml:4: the key "c" is given twice'),
    ("- 1", "f.yaml:1: the document is not a mapping"),
    ("\n\n--- 7\n", "f.yaml:3: the document is not a mapping"),
    ("a: !!python/object/apply:os.system [x]", "f.yaml:1: the tag"),
    ("a: !!binary eA==", "f.yaml:1: the tag"),
    ("a: 1\nb: \x01", "f.yaml:2: not YAML"),
    ("a: &x [*x]", 'f.yaml:1: the alias *"x" names no finished anchor'),
    ("a: *x", "names no finished anchor"),
    ("a: &x 1\n---\nb: *x", "f.yaml:3: the alias"),
    ("[" * 100_000, "f.yaml:1: nested deeper than 32 levels"),
    ("a: " + "{b: " * 50, "f.yaml:1: nested deeper"),
    ("1: 2", "f.yaml:1: a key is not a string"),
    ("? [a]\n: b", "f.yaml:1: a key is not a string"),
    ("true: 2", "f.yaml:1: a key is not a string"),
    ("\ud800: x", "f.yaml: not YAML"),
    ("kind: List\nitems: 3", "f.yaml:1: items: "),
    ("kind: List\nitems: [3]", "f.yaml:1: items[0]: is not a mapping"),
    ("kind: List\nitems: []\nspec: {}", 'items: a "List" has a list called items and nothing else; remove "spec"'),
    ("apiVersion: v2\nkind: List\nitems: []", 'f.yaml:1: apiVersion: "v2" is not known here for a "List"; give v1 or'),
    ("apiVersion: []\nkind: List\nitems: []", "f.yaml:1: apiVersion: "),
    ("kind: TierList\nmetadata: {}", 'items: a "TierList" has a list called items and nothing else; add it'),
    ("kind: TierList\nitems: [{kind: Tier}, {kind: Host}]", 'items[1].kind: "Host" in a "TierList"; make'),
    ("kind: TierList\nitems: [{kind: Tier}, ~]", "items[1]: is not a mapping"),
    ("x" * (10 * 1024 * 1024 + 1), "f.yaml: is larger than 10 MB"),
    ("é" * (5 * 1024 * 1024 + 1), "f.yaml: is larger than 10 MB"),
]


@pytest.mark.parametrize(("text", "line"), BAD_YAML, ids=range(len(BAD_YAML)))
def test_bad_yaml_is_one_line_with_file_and_line(text: str, line: str) -> None:
    with pytest.raises(ResourceError) as caught:
        load_yaml(text, "f.yaml")
    assert line in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_alias_bomb_is_counted_in_full() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    with pytest.raises(ResourceError, match=f"more than {MAX_NODES} values"):
        load_yaml("\n".join(levels), "f.yaml")
    assert load_yaml("\n".join(levels[:3]), "f.yaml")  # the same, harmless


def test_scalars_follow_yaml_1_2() -> None:
    text = """
    a: [80:59, 0o17, 010, 1_000, 0x10, on, yes, No, 2024-05-01, "1", 'true', .inf, <<]
    b: [1, -7, +3, true, False, ~, null, 1.5, 1e3, ]
    c:
    """
    (document,) = load_yaml(text, "f.yaml")
    assert document.value == {
        "a": ["80:59", "0o17", "010", "1_000", "0x10", "on", "yes", "No", "2024-05-01", "1", "true", ".inf", "<<"],
        "b": [1, -7, 3, True, False, None, None, 1.5, 1000.0],
        "c": None,
    }


def test_documents_know_their_line_and_errors_name_it() -> None:
    text = "# comment\n---\nkind: A\n---\nkind: List\nitems:\n- kind: B\n- kind: C\n"
    documents = load_yaml(text, "f.yaml")
    assert [(d.value["kind"], d.line) for d in documents] == [("A", 3), ("B", 5), ("C", 5)]
    with pytest.raises(ResourceError) as caught:
        decode(Document(policy(order="x"), "f.yaml", 12))
    assert str(caught.value).startswith('f.yaml:12: GlobalNetworkPolicy p: spec.order: "x" is not a number; give')


def test_lists_are_their_items_and_errors_name_the_place() -> None:
    tier = "{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: %s, uid: x}, spec: {order: %s}}"
    text = "apiVersion: projectcalico.org/v3\nkind: TierList\nmetadata: {resourceVersion: '7'}\nitems:\n"
    text += "\n".join(f"- {tier % pair}" for pair in (("a", 1), ("b", 2), ("c", "x")))
    first, second, third = load_yaml(text, "f.yaml")
    assert [decode(d).name for d in (first, second)] == ["a", "b"]
    with pytest.raises(ResourceError, match=r'^f.yaml:1: Tier c: items\[2\].spec.order: "x" is not a number'):
        decode(third)
    (mixed, *_) = load_yaml(f"kind: List\nitems:\n- {tier % ('a', 1)}\n- kind: Host\n", "f.yaml")
    assert decode(mixed) == decode(first)


def test_json_is_yaml() -> None:
    (document,) = load_yaml(json.dumps(policy(selector="has(x)"), indent="\t"), "f.json")
    assert decode(document) == decode(policy(selector="has(x)"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@,?\n \t1.~\\", max_size=60) | st.text(max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_text_is_documents_or_one_line(text: str) -> None:
    try:
        load_yaml(text, "f.yaml")
    except ResourceError as error:
        assert str(error).startswith("f.yaml") and str(error).isprintable()


finite = json_values.filter(lambda v: "inf" not in repr(v) and "nan" not in repr(v))


@given(st.dictionaries(st.text(max_size=9), finite))
@settings(max_examples=300, deadline=None)
def test_dumped_yaml_reads_back(value: dict[str, Any]) -> None:
    try:
        (document,) = load_yaml(dump_yaml(value), "f.yaml")
    except ResourceError as error:
        assert "surrogate" in str(error) or "List" in str(error)
    else:
        assert document.value == value and repr(document.value) == repr(value)
