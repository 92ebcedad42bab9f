# Schemathesis against a real dispatcher over TLS: whatever the OpenAPI document allows, and what it forbids, changing
# operations included, is answered as the document says.
from __future__ import annotations

import base64
import copy
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from api_rig import Served
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.core.failures import FailureGroup

from dispatcher.api.openapi import DOCUMENT
from dispatcher.store.commits import Table, encode_record
from slash32 import resources
from slash32.policy import Tier

COUNT = 200 if os.environ.get("SLASH32_COUNTS") == "full" else 20
NAMES = ["a", "b", "c.d", "default"]
KINDS = [*resources.KINDS, "gnp", "hosts", "Nonsense"]
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
Json = dict[str, Any]


def one_of(*words: object) -> Json:
    return {"enum": list(words)}


KEYS = ["X]+9gId{iHrQk})+WQNPJAgaRnGzi)Xkt<[{]%:2", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"]
SELECTORS = ["", "all()", "role == 'web'", "has(role)", "role in {'db', 'web'}", "!has(x)", "role ="]
ROW = [Table.RESOURCE.value, ["Tier", "a"], base64.b64encode(encode_record(Tier("a", 1.0))).decode()]
FEW: Json = {
    "name": one_of(*NAMES), "kind": one_of(*KINDS), "tier": one_of("default", *NAMES), "node": one_of(*NAMES),
    "selector": one_of(*SELECTORS), "notSelector": one_of(*SELECTORS[1:]), "publicKey": one_of(*KEYS, "0" * 40),
    "interfaceName": one_of("eth0", "*", "lo"), "role": one_of("web", "db"),
    "hosts": {"type": "array", "items": one_of(*NAMES)}, "epoch": one_of("0123456789abcdef", "x"),
}  # fmt: skip


def narrowed(mode: GenerationMode) -> Json:
    """Few names and addresses, so that operations meet and make sense; no long waits (where the document's own bounds
    are not what is tried); no stream without an end (test_api_watch.py watches it)."""
    document = copy.deepcopy(DOCUMENT)
    del document["paths"]["/v1/watch"]
    schemas = document["components"]["schemas"]
    schemas["prefix"] = one_of("10.0.0.0/8", "192.0.2.0/24", "fd00::/8", "192.0.2.1", "10.0.0.1/8")
    schemas["address"] = one_of("192.0.2.1", "fd00::1", "127.0.0.1", "192.0.2")
    schemas["labels"] = {"type": "object", "properties": {"role": {}}, "additionalProperties": False}
    mine = schemas["Given"] = copy.deepcopy(schemas["Backup"])  # not what a backup gives
    mine["properties"]["records"]["items"] = one_of(ROW, [*ROW[:2], "AAAA"], [*ROW[:2], 1])
    document["paths"]["/v1/restore"]["post"]["requestBody"]["content"]["application/json"]["schema"] = mine
    for kind in resources.KINDS:
        few(schemas[kind]["properties"]["metadata"])
        few(schemas[kind]["properties"]["spec"])
    for name in ("peer", "labels", "NewHost", "Adopt", "Question", "Given"):
        few(schemas[name])
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation["parameters"]:
                name, most = parameter["name"], {"number": 40, "wait": 0.01}
                parameter["schema"] = FEW.get(name, parameter["schema"])
                if name in most and mode is GenerationMode.POSITIVE:
                    parameter["schema"] = {**parameter["schema"], "maximum": most[name]}
            few(operation.get("requestBody", {}))
    if mode is GenerationMode.NEGATIVE:  # any word is an epoch
        mine["properties"]["epoch"] = schemas["Backup"]["properties"]["epoch"]
    return document


def few(schema: Any) -> None:
    """All properties below, by their names."""
    if isinstance(schema, list):
        for each in schema:
            few(each)
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "properties":
                value.update({name: FEW[name] for name in value if name in FEW})
            few(value)


def operations(document: Json) -> dict[str, Any]:
    schema = schemathesis.openapi.from_dict(document)
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


OPERATIONS = {mode: operations(narrowed(mode)) for mode in GenerationMode}
POSSIBLE = OPERATIONS[GenerationMode.POSITIVE]
QUIET = settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def session(served: Served) -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = f"Bearer {served.tokens['admin']}"
        yield session


def ask(case: Any, served: Served, session: requests.Session) -> Any:
    base = f"https://127.0.0.1:{served.api_port}"
    return case.call(base_url=base, session=session, timeout=30, verify=str(served.cert))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", POSSIBLE)
def test_what_is_written_down_is_what_happens(
    label: str, mode: GenerationMode, served: Served, session: requests.Session
) -> None:
    """What the document forbids is refused, too."""
    forbidden = mode is GenerationMode.NEGATIVE
    if forbidden and not refusable(label):
        pytest.skip("takes nothing that could be wrong")

    @QUIET
    @given(case=OPERATIONS[mode][label].as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = ask(case, served, session)
        case.validate_response(response, checks=[*CHECKS, checks.negative_data_rejection] if forbidden else CHECKS)

    run()
    assert served.quiet(), served.log.read_text()[-2000:]


def test_one_after_the_other(served: Served, session: requests.Session) -> None:
    """All that changes something, in any order: what one made, the next finds."""
    changing = [found for label, found in POSSIBLE.items() if not label.startswith("GET /v1/openapi")]
    seen = Counter[tuple[str, int]]()

    @settings(QUIET, max_examples=30 * COUNT)
    @given(case=st.one_of([found.as_strategy(generation_mode=GenerationMode.POSITIVE) for found in changing]))
    def run(case: Any) -> None:
        response = ask(case, served, session)
        case.validate_response(response, checks=CHECKS)
        seen[case.operation.label, response.status_code] += 1

    run()
    assert served.quiet(), served.log.read_text()[-2000:]
    done = {label for label, status in seen if status == 200}
    made = {"POST /v1/apply", "POST /v1/hosts", "POST /v1/hosts/{name}/fence", "POST /v1/restore"}
    assert done >= {*made, "GET /v1/resources/{kind}/{name}", "DELETE /v1/resources/{kind}/{name}"}, "the control"


def refusable(label: str) -> bool:
    method, path = label.split()
    operation = DOCUMENT["paths"][path][method.lower()]
    return bool(operation["parameters"] or "requestBody" in operation)


@pytest.mark.parametrize("lie", ["type", "missing", "status", "content"])
def test_a_document_that_lies_is_found(lie: str, served: Served, session: requests.Session) -> None:
    document = narrowed(GenerationMode.POSITIVE)
    status = document["components"]["schemas"]["Status"]
    responses = document["paths"]["/v1/status"]["get"]["responses"]
    match lie:
        case "type":
            status["properties"]["revision"] = {"type": "string"}
        case "missing":
            status["required"].append("colour")
        case "status":
            responses["201"] = responses.pop("200")
        case "content":
            responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    case = operations(document)["GET /v1/status"].Case()
    response = ask(case, served, session)
    with pytest.raises(FailureGroup):
        case.validate_response(response, checks=CHECKS)
    honest = POSSIBLE["GET /v1/status"].Case()
    honest.validate_response(ask(honest, served, session), checks=CHECKS)
