# Every malformed document of corpus/bad is refused with exactly the line that stands beside it: object, path, remedy.
from __future__ import annotations

import re
from typing import Any

import pytest

from slash32.documents import dump_yaml, load_yaml
from slash32.errors import ResourceError
from slash32.resources import KINDS, decode, encode, kind_of
from tests.unit.slash32.refusals import Case, cases, valid_documents

CASES = cases()
VALID = valid_documents()
REMEDY = re.compile(r"\b(give|remove|add|write|use|make|put it in quotes|did you mean|known here|expected)\b")


def test_the_corpus_is_large_and_broad() -> None:
    assert len(CASES) >= 300
    assert len({case.line for case in CASES}) >= 300, "no clones"
    assert {str(case.document.get("kind")) for case in CASES} >= set(KINDS)
    paths = {re.sub(r"\[\d+\]", "[]", case.path) for case in CASES}
    assert len(paths) >= 75, len(paths)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file.removesuffix('.yaml')}-{case.path}")
def test_refused_with_one_line_that_names_object_path_and_remedy(case: Case) -> None:
    with pytest.raises(ResourceError) as caught:
        decode(case.document)
    line = str(caught.value)
    assert line == case.line
    assert line.isprintable() and len(line) < 400
    assert REMEDY.search(case.says)
    assert case.object.split()[0] in (case.document.get("kind"), "document")
    assert case.path or "is missing" in case.says, "only what is missing at the very top has no path"


@pytest.mark.parametrize("name", VALID)
def test_the_valid_sibling_is_accepted(name: str) -> None:
    resource = decode(VALID[name])
    assert kind_of(resource) == VALID[name]["kind"]
    assert decode(encode(resource)) == resource


def test_every_kind_has_a_valid_sibling() -> None:
    assert {document["kind"] for document in VALID.values()} == set(KINDS)


def test_a_bad_document_is_named_with_its_file_line_and_place_in_a_list() -> None:
    good: Any = VALID["tier.yaml"]
    bad = {**good, "spec": {"order": "x"}}
    text = "# a comment\n" + dump_yaml({"apiVersion": "v1", "kind": "List", "items": [good, good, bad]})
    documents = load_yaml(text, "f.yaml")
    assert decode(documents[0]) == decode(documents[1])
    with pytest.raises(ResourceError) as caught:
        decode(documents[2])
    assert str(caught.value).startswith('f.yaml:2: Tier security: items[2].spec.order: "x" is not a number; give')
