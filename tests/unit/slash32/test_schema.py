# The JSON Schemas: what is valid passes, what is structurally wrong does not, and they are sound schemas themselves.
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from slash32 import hosts, networksets, policies, rules
from slash32.cli.__main__ import main
from slash32.documents import load_yaml
from slash32.resources import KINDS, decode
from slash32.schema import DRAFT, LISTS, schema_of
from tests.unit.slash32.refusals import Case, cases, valid_documents

REPO = Path(__file__).resolve().parents[3]
AS_IT_WAS = "exported.yaml"  # of docs/from-calico.md: what of it is refused, test_docs.py reads in the page
OTHERS = (AS_IT_WAS, "alerts.yaml", "prometheus.yaml")  # not ours
EXAMPLES = [path for path in (REPO / "examples").rglob("*.yaml") if path.name not in OTHERS]
FILES = sorted([*EXAMPLES, *(Path(__file__).parent / "corpus/ok").glob("*.yaml")])
ANY = jsonschema.Draft202012Validator(schema_of())
OF_KIND = {kind: jsonschema.Draft202012Validator(schema_of(kind)) for kind in KINDS}
VALID = valid_documents()
CASES = cases()
STRUCTURAL = [case for case in CASES if not case.sense]
SENSE = [case for case in CASES if case.sense]


def resources(path: Path) -> list[dict[str, Any]]:
    return [dict(document.value) for document in load_yaml(path.read_text(), path.name)]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_they_are_schemas(kind: str | None) -> None:
    schema = schema_of(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == DRAFT
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_valid_files_pass(path: Path) -> None:
    found = [document for document in resources(path) if document["kind"] in KINDS]
    for document in found:
        decode(document)
        assert [error.message for error in ANY.iter_errors(document)] == []
        assert OF_KIND[document["kind"]].is_valid(document)
        assert [kind for kind in KINDS if OF_KIND[kind].is_valid(document)] == [document["kind"]]


def test_the_files_hold_something() -> None:
    kinds = {document["kind"] for path in FILES for document in resources(path)}
    assert kinds >= set(KINDS)


@pytest.mark.parametrize("name", VALID)
def test_valid_siblings_pass(name: str) -> None:
    assert ANY.is_valid(VALID[name])


@pytest.mark.parametrize("case", STRUCTURAL, ids=lambda case: f"{case.file.removesuffix('.yaml')}-{case.path}")
def test_structural_errors_fail(case: Case) -> None:
    assert not ANY.is_valid(case.document)


def test_sense_is_more_than_structure() -> None:
    """The control: these are refused, by the decoder alone."""
    assert len(SENSE) >= 30
    assert len(STRUCTURAL) >= 300
    for case in SENSE:
        assert ANY.is_valid(case.document), case.line


@pytest.mark.parametrize("kind", LISTS)
def test_lists_are_checked_item_by_item(kind: str) -> None:
    good = VALID["tier.yaml"]
    assert ANY.is_valid({"apiVersion": "v1", "kind": kind, "metadata": {"resourceVersion": "7"}, "items": [good]})
    assert not ANY.is_valid({"apiVersion": "v1", "kind": kind, "items": [good, {**good, "spec": {"ordr": 1}}]})
    assert not ANY.is_valid({"apiVersion": "v1", "kind": kind, "items": good})


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("GlobalNetworkPolicy", policies.POLICY),
        ("StagedGlobalNetworkPolicy", policies.STAGED),
        ("Tier", policies.TIER),
        ("Profile", policies.PROFILE),
        ("GlobalNetworkSet", networksets.NETWORK_SET),
        ("HostEndpoint", hosts.HOST_ENDPOINT),
        ("Host", hosts.HOST),
    ],
)
def test_they_know_the_decoders_fields(kind: str, fields: tuple[str, ...]) -> None:
    defined: Any = schema_of(kind)["$defs"]
    assert tuple(defined[kind]["properties"]["spec"]["properties"]) == fields
    assert tuple(defined["rule"]["properties"]) == rules.RULE
    assert tuple(defined["peer"]["properties"]) == rules.PEER
    assert defined["rule"]["properties"]["action"]["enum"] == list(rules.ACTIONS)


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema_of()
    assert main(["schema", "gnp"]) == 0
    assert json.loads(capsys.readouterr().out) == schema_of("GlobalNetworkPolicy")
    assert main(["schema", "tiers", "-o", "yaml"]) == 0
    (document,) = load_yaml(capsys.readouterr().out, "out")
    assert document.value == schema_of("Tier")


def test_the_command_refuses_other_kinds_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "pod\n"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and 'there is no kind "pod' in complaint and "Tier" in complaint
