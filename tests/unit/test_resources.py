# Documents <-> model: what is accepted (corpus), what is refused and with which line (tables), and round trips.
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slash32.errors import ResourceError
from slash32.model import Host
from slash32.net import parse_address, parse_prefix
from slash32.policy import Action, Direction, Icmp, Peer, Policy, PortRange, Profile, Rule
from slash32.resources import KINDS, Resource, decode, encode, find_kind, kind_of, load_yaml
from slash32.selector import parse

CORPUS = sorted((Path(__file__).parent / "corpus" / "ok").glob("*.yaml"))
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
KEY = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"


def policy(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "GlobalNetworkPolicy", "metadata": {"name": "p"}, "spec": spec}


def ingress(**rule: Any) -> dict[str, Any]:
    return policy(ingress=[{"action": "Allow", **rule}])


def host(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "Host", "metadata": {"name": "h1"}, "spec": spec}


def profile(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "Profile", "metadata": {"name": "d"}, "spec": spec}


@pytest.mark.parametrize("path", CORPUS + EXAMPLES, ids=lambda p: p.name)
def test_corpus_is_accepted_and_round_trips(path: Path) -> None:
    documents = load_yaml(path.read_text(), path.name)
    assert documents
    for document in documents:
        resource = decode(document)
        encoded = encode(resource)
        assert decode(json.loads(json.dumps(encoded))) == resource
        assert encode(decode(encoded)) == encoded


def test_a_policy_in_full() -> None:
    web = decode(load_yaml(CORPUS[-1].read_text(), "web.yaml")[0])
    source = Peer(
        nets=(parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/8")),
        not_nets=(parse_prefix("10.1.0.0/16"),),
        selector='role in {"lb"}',
        not_selector="has(quarantine)",
        not_ports=(PortRange(25, 25),),
    )
    ports = Peer(ports=(PortRange(80, 80), PortRange(443, 443), PortRange(8000, 8080)))
    assert web == Policy(
        name="allow-web",
        selector='(role == "web" && env not in {"dev", "test"})',
        types=(Direction.INGRESS, Direction.EGRESS),
        order=10.5,
        ingress=(
            Rule(Action.ALLOW, protocol=6, source=source, destination=ports),
            Rule(Action.ALLOW, protocol=1, icmp=Icmp(8, 0), not_icmp=Icmp(5)),
            Rule(Action.DENY, not_protocol=6, ip_version=6),
        ),
        egress=(Rule(Action.ALLOW),),
    )


def test_a_list_a_profile_and_a_host() -> None:
    documents = load_yaml(CORPUS[-1].read_text(), "web.yaml")
    assert [kind_of(decode(d)) for d in documents] == [*["GlobalNetworkPolicy"] * 2, "Profile", "Host"]
    assert decode(documents[2]) == Profile(
        "default", (Rule(Action.ALLOW),), (Rule(Action.ALLOW),), {"tier": "1", "example.org/zone": "on"}
    )
    assert decode(documents[3]) == Host(
        "h1.rack2.example",
        KEY,
        (parse_address("192.0.2.1"), parse_address("2001:db8::1")),
        (parse_prefix("10.65.0.0/24"),),
        {"env": ("prod", "test"), "role": ()},
    )


@pytest.mark.parametrize(
    ("spec", "types"),
    [
        ({}, ["Ingress"]),
        ({"ingress": [{"action": "Allow"}]}, ["Ingress"]),
        ({"egress": [{"action": "Allow"}]}, ["Egress"]),
        ({"egress": [{"action": "Allow"}], "ingress": [{"action": "Deny"}]}, ["Ingress", "Egress"]),
        ({"egress": [], "ingress": []}, ["Ingress"]),
        ({"types": ["Egress", "Ingress"]}, ["Ingress", "Egress"]),
        ({"types": ["Egress"]}, ["Egress"]),
    ],
)
def test_types_default_as_in_calico(spec: dict[str, Any], types: list[str]) -> None:
    decoded = decode(policy(**spec))
    assert isinstance(decoded, Policy)
    assert [t.value for t in decoded.types] == types


def with_metadata(**metadata: Any) -> dict[str, Any]:
    return {**policy(), "metadata": metadata}


# document, what the line must hold
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "document: apiVersion is missing"),
    ({**policy(), "apiVersion": "v1"}, 'GlobalNetworkPolicy p: apiVersion: "v1" is not known here; give slash32/v1'),
    ({**policy(), "apiVersion": 1}, "apiVersion: 1 is not a string; put it in quotes"),
    ({**policy(), "kind": "Pod"}, 'kind: "Pod" is not known here; give GlobalNetworkPolicy or Profile or Host'),
    ({**policy(), "kind": "Tier"}, 'Tier p: kind: "Tier" is not supported by this version'),
    ({**policy(), "status": {}}, "status: is not supported by this version"),
    ({**policy(), "spec": None}, "spec: has no value"),
    ({**policy(), "spec": []}, "spec: a list is not a mapping"),
    ({k: v for k, v in policy().items() if k != "spec"}, "GlobalNetworkPolicy p: spec is missing"),
    ({k: v for k, v in policy().items() if k != "metadata"}, "GlobalNetworkPolicy: metadata is missing"),
    (with_metadata(), "metadata: name is missing"),
    (with_metadata(name="p", namespace="x"), "metadata.namespace: is not supported by this version"),
    (with_metadata(name="p", labels={}), "metadata.labels: is not supported by this version"),
    (with_metadata(name="p", nam="x"), "metadata.nam: unknown field (did you mean name?)"),
    (with_metadata(name="P"), 'metadata.name: "P" is not a name'),
    (with_metadata(name="p_q"), 'metadata.name: "p_q" is not a name'),
    (with_metadata(name="-p"), 'metadata.name: "-p" is not a name'),
    (with_metadata(name="p..q"), 'metadata.name: "p..q" is not a name'),
    (with_metadata(name="p\n"), "metadata.name: "),
    (with_metadata(name=""), 'metadata.name: "" is not a name'),
    (with_metadata(name="a" * 64), "is not a name"),
    (with_metadata(name="a." * 127), "metadata.name: has 254 characters; at most 253 are allowed"),
    (with_metadata(name=7), "metadata.name: 7 is not a string"),
    ({**host(), "metadata": {"name": "a" * 63 + ".b"}}, "metadata.name: has 65 characters; at most 64"),
    (policy(ingres=[]), "spec.ingres: unknown field (did you mean ingress?)"),
    (policy(**{"x\ny": 1}), 'spec."x\\ny": unknown field'),
    (policy(tier="default"), "spec.tier: is not supported by this version"),
    (policy(doNotTrack=False), "spec.doNotTrack: is not supported by this version"),
    (policy(preDNAT=True), "spec.preDNAT: is not supported"),
    (policy(applyOnForward=True), "spec.applyOnForward: is not supported"),
    (policy(namespaceSelector="all()"), "spec.namespaceSelector: is not supported"),
    (policy(order="10"), 'spec.order: "10" is not a number'),
    (policy(order=True), "spec.order: true is not a number"),
    (policy(order=float("nan")), "spec.order: is not a finite number"),
    (policy(order=10**400), "spec.order: is not a finite number"),
    (policy(selector=None), "spec.selector: has no value"),
    (policy(selector=1), "spec.selector: 1 is not a string"),
    (policy(selector="a = 'b'"), "spec.selector: \"a = 'b'\": column 3: expected an operator"),
    (policy(selector="x\n"), 'spec.selector: "x\\n": column 2'),
    (policy(selector="a == '" + "x" * 1018 + "'"), "spec.selector: has 1025 characters; at most 1024 are allowed"),
    (policy(selector="global()"), 'spec.selector: "global()": global() selects nothing'),
    (policy(types=[]), "spec.types: is empty"),
    (policy(types="Ingress"), 'spec.types: "Ingress" is not a list'),
    (policy(types=["ingress"]), 'spec.types[0]: "ingress" is not known here; give Ingress or Egress'),
    (policy(types=["Ingress", "Ingress"]), "spec.types[1]: Ingress is given twice"),
    (policy(types=["Ingress"], egress=[{"action": "Allow"}]), "spec.egress: has rules, but spec.types lacks Egress"),
    (policy(types=["Egress"], ingress=[{"action": "Allow"}]), "spec.ingress: has rules, but spec.types lacks Ingress"),
    (policy(ingress={}), "spec.ingress: a mapping is not a list"),
    (policy(ingress=[None]), "spec.ingress[0]: nothing is not a mapping"),
    (policy(ingress=[{}]), "spec.ingress[0]: action is missing"),
    (policy(ingress=[{"action": "allow"}]), 'spec.ingress[0].action: "allow" is not known here; give Allow or Deny'),
    (policy(ingress=[{"action": "Log"}]), 'spec.ingress[0].action: "Log" is not supported by this version'),
    (policy(egress=[{"action": "Pass"}]), 'spec.egress[0].action: "Pass" is not supported by this version'),
    (ingress(http={}), "spec.ingress[0].http: is not supported by this version"),
    (ingress(metadata={}), "spec.ingress[0].metadata: is not supported"),
    (ingress(source={"services": {}}), "spec.ingress[0].source.services: is not supported by this version"),
    (ingress(source={"serviceAccounts": {}}), "source.serviceAccounts: is not supported by this version"),
    (ingress(source={"namespaceSelector": "all()"}), "source.namespaceSelector: is not supported by this version"),
    (ingress(destination={"port": 80}), "spec.ingress[0].destination.port: unknown field (did you mean ports?)"),
    (ingress(protocol="TPC"), 'spec.ingress[0].protocol: "TPC" is not a protocol: give ICMP, TCP'),
    (ingress(protocol=0), "protocol: 0 is not a protocol"),
    (ingress(protocol=256), "protocol: 256 is not a protocol"),
    (ingress(protocol=True), "protocol: true is not a protocol"),
    (ingress(protocol=6.0), "protocol: 6.0 is not a protocol"),
    (ingress(notProtocol="06"), 'notProtocol: "06" is not a protocol'),
    (ingress(ipVersion=5), "ipVersion: 5 is not an IP version: give 4 or 6"),
    (ingress(ipVersion="4"), 'ipVersion: "4" is not an IP version'),
    (ingress(icmp={"type": 8}), "icmp: needs the rule's protocol to be ICMP or ICMPv6"),
    (ingress(protocol="TCP", notICMP={"type": 8}), "notICMP: needs the rule's protocol"),
    (ingress(protocol="ICMP", icmp={}), "icmp: type is missing; give 0..254"),
    (ingress(protocol="ICMP", icmp={"code": 1}), "icmp: type is missing; give 0..254 (a code alone means nothing)"),
    (ingress(protocol="ICMP", icmp={"type": 255}), "icmp.type: 255 is out of range: give 0..254"),
    (ingress(protocol="ICMP", icmp={"type": 8, "code": 256}), "icmp.code: 256 is out of range: give 0..255"),
    (ingress(protocol="ICMP", icmp={"type": "8"}), 'icmp.type: "8" is not a whole number'),
    (ingress(protocol="ICMP", icmp={"type": False}), "icmp.type: false is not a whole number"),
    (ingress(protocol="ICMP", ipVersion=6), "spec.ingress[0].ipVersion: 6 contradicts protocol ICMP"),
    (ingress(protocol=58, ipVersion=4), "ipVersion: 4 contradicts protocol ICMPv6"),
    (ingress(protocol="ICMPv6", source={"nets": ["::/0", "10.0.0.0/8"]}), "source.nets[1]: 10.0.0.0/8 is IPv4"),
    (ingress(ipVersion=4, destination={"notNets": ["fd00::/8"]}), "destination.notNets[0]: fd00::/8 is IPv6"),
    (ingress(source={"nets": ["10.0.0.0/8"]}, destination={"nets": ["::1"]}), "destination: nets is of another IP"),
    (ingress(source={"nets": ["10.0.0.0/8"], "notNets": ["0.0.0.0/0"]}), "notNets[0]: 0.0.0.0/0 leaves nothing"),
    (ingress(source={"nets": []}), "spec.ingress[0].source.nets: is empty"),
    (ingress(source={"nets": ["10.0.0.1/8"]}), 'source.nets[0]: "10.0.0.1/8" is not a prefix'),
    (ingress(source={"nets": ["10.0.0.0/33"]}), 'source.nets[0]: "10.0.0.0/33" is not a prefix'),
    (ingress(source={"nets": ["x\x1b[31m"]}), 'source.nets[0]: "x\\x1b[31m" holds a control character'),
    (ingress(source={"nets": [167772160]}), "source.nets[0]: 167772160 is not a string"),
    (ingress(source={"nets": ["10.0.0.0/8"] * 257}), "source.nets: has 257 entries; at most 256 are allowed"),
    (ingress(source={"selector": ""}), "source.selector: is empty: remove the field to mean anybody, or write all()"),
    (ingress(source={"notSelector": " \t"}), "source.notSelector: is empty"),
    (ingress(source={"selector": "has(x) && global()"}), "source.selector: "),
    (ingress(source={"selector": "role"}), 'source.selector: "role": column 5: expected an operator after label'),
    (ingress(destination={"ports": [80]}), "destination.ports: needs the rule's protocol to be TCP, UDP"),
    (ingress(protocol="ICMP", destination={"notPorts": [80]}), "destination.notPorts: needs the rule's protocol"),
    (ingress(notProtocol="ICMP", source={"ports": [80]}), "source.ports: needs the rule's protocol"),
]
PORTS: list[tuple[Any, str]] = [
    ("70000", '"70000" is not a port: give 1..65535'),
    (70000, "70000 is not a port: give 1..65535"),
    (0, "0 is not a port"),
    ("0:80", '"0:80" is not a port'),
    ("http", '"http": named ports are not supported by this version'),
    ("90:80", '"90:80": the range runs backwards; give 80:90'),
    ("80-90", '"80-90" is not a port: give 1..65535 or a range like "80:90"'),
    ("80:90:100", '"80:90:100" is not a port'),
    ("080", '"080" is not a port'),
    ("٨٠", "is not a port"),
    ("", '"" is not a port'),
    (80.0, "80.0 is not a string"),
    (True, "true is not a string"),
    (-1, "-1 is not a port"),
    ([80], "a list is not a string"),
]
REFUSED += [
    (ingress(protocol="TCP", destination={"ports": [80, port]}), f"spec.ingress[0].destination.ports[1]: {line}")
    if not line.startswith("is ")
    else (ingress(protocol="TCP", destination={"ports": [80, port]}), line)
    for port, line in PORTS
]
REFUSED += [
    (profile(order=1), "Profile d: spec.order: unknown field"),
    (profile(labelsToApply={"a b": "x"}), 'spec.labelsToApply."a b": is not a label name'),
    (profile(labelsToApply={"a": 1}), "spec.labelsToApply.a: 1 is not a string; put it in quotes"),
    (profile(labelsToApply={"a": "x\ny"}), "spec.labelsToApply.a: "),
    (profile(labelsToApply={"a": None}), "spec.labelsToApply.a: has no value"),
    (profile(labelsToApply={1: "x"}), "spec.labelsToApply: the key 1 is not a string"),
    (profile(labelsToApply={f"k{n}": "" for n in range(129)}), "spec.labelsToApply: has 129 labels; at most 128"),
    (host(publicKey="x"), 'Host h1: spec.publicKey: "x" is not a CURVE public key'),
    (host(publicKey="#" * 40), "spec.publicKey: "),
    (host(publicKey=KEY[:-1] + "~"), "spec.publicKey: "),
    (host(addresses=["192.0.2.1", "192.0.2.2"]), "spec.addresses[1]: a second IPv4 address"),
    (host(addresses=["192.0.2.0/24"]), 'spec.addresses[0]: "192.0.2.0/24" is not an IP address'),
    (host(addresses=["fe80::1%eth0"]), 'spec.addresses[0]: "fe80::1%eth0" is not an IP address'),
    (host(nets=[]), "spec.nets: is empty"),
    (host(nets=["x"]), 'spec.nets[0]: "x" is not a prefix'),
    (host(labels={"env": "prod"}), 'spec.labels.env: "prod" is not a list'),
    (host(labels={"env": [1]}), "spec.labels.env[0]: 1 is not a string"),
    (host(key=KEY), "spec.key: unknown field"),
]


@pytest.mark.parametrize(("document", "line"), REFUSED)
def test_refusals_are_one_line_that_names_the_field(document: dict[str, Any], line: str) -> None:
    with pytest.raises(ResourceError) as caught:
        decode(document)
    text = str(caught.value)
    assert line in text
    assert text.isprintable() and len(text) < 500


@pytest.mark.parametrize(
    "document",
    [
        policy(),
        with_metadata(name="a." * 126 + "a"),
        policy(selector="a == '" + "x" * 1017 + "'"),
        ingress(source={"nets": ["10.0.0.0/8"] * 256}),
        ingress(protocol="TCP", destination={"ports": [1, "65535", "80:80"]}),
        ingress(protocol="ICMP", icmp={"type": 254, "code": 255}),
        ingress(source={"nets": ["10.0.0.0/8", "fd00::/8"], "notNets": ["0.0.0.0/0"]}),
        ingress(source={"selector": "all()"}),
        host(),
        {**host(), "metadata": {"name": "a" * 63}},
        host(publicKey=KEY),
        profile(),
    ],
)
def test_the_limits_themselves_are_accepted(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    resource = decode(document)
    assert decode(encode(resource)) == resource
    assert document == before


def test_a_long_canonical_selector_can_be_stored() -> None:
    text = "a in{" + ",".join(f"'{n:03}'" for n in range(169)) + "}"
    assert len(text) <= 1024 < len(str(parse(text)))
    resource = decode(policy(selector=text))
    with pytest.raises(ResourceError):
        decode(encode(resource))
    assert decode(encode(resource), stored=True) == resource


def test_huge_values_do_not_make_huge_lines() -> None:
    for spec in ({"order": "x" * 10**6}, {"order": 10**5000}, {"x" * 10**6: 1}, {"selector": "(" * 10**6}):
        with pytest.raises(ResourceError) as caught:
            decode(policy(**spec))
        assert len(str(caught.value)) < 500


def test_find_kind() -> None:
    for word in ("gnp", "GlobalNetworkPolicy", "globalnetworkpolicies", "GNP"):
        assert find_kind(word) == KINDS["GlobalNetworkPolicy"]
    assert find_kind("hosts") == KINDS["Host"]
    assert find_kind("profiles") == KINDS["Profile"]
    assert find_kind("pods") is None


# --- generated resources round-trip

versions4 = st.builds(lambda n, bits: parse_prefix(f"{n}.0.0.0/{bits}"), st.integers(1, 223), st.integers(8, 32))
versions6 = st.builds(lambda n: parse_prefix(f"fd00:{n:x}::/32"), st.integers(0, 0xFFFF))
nets = st.lists(versions4 | versions6, max_size=3).map(tuple)
selectors = st.none() | st.sampled_from(["all()", 'a == "b"', '(has(a) && !has(b))', "a in {}", "a == 'q\"'"])
ports = st.lists(
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda p: PortRange(min(p), max(p))), max_size=3
).map(tuple)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    protocol = draw(st.none() | st.sampled_from([1, 6, 17, 58, 132, 136, 255]))
    icmp = st.none() | st.builds(Icmp, st.integers(0, 254), st.none() | st.integers(0, 255))
    with_icmp, with_ports = protocol in (1, 58), protocol in (6, 17, 132, 136)

    def peer() -> Peer:
        return Peer(
            selector=draw(selectors),
            not_selector=draw(selectors),
            ports=draw(ports) if with_ports else (),
            not_ports=draw(ports) if with_ports else (),
            nets=() if with_icmp else draw(nets.filter(lambda n: {p.version for p in n} != {6})),
            not_nets=() if with_icmp else draw(nets),
        )

    return Rule(
        action=draw(st.sampled_from(Action)),
        protocol=protocol,
        not_protocol=draw(st.none() | st.integers(1, 255)),
        icmp=draw(icmp) if with_icmp else None,
        not_icmp=draw(icmp) if with_icmp else None,
        source=peer(),
        destination=peer(),
    )


rule_lists = st.lists(rules(), max_size=3).map(tuple)
policies = st.builds(
    Policy,
    name=st.just("p"),
    selector=selectors.filter(bool),
    types=st.just((Direction.INGRESS, Direction.EGRESS)),
    order=st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9).map(float),
    ingress=rule_lists,
    egress=rule_lists,
)
label_texts = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=5)
profiles = st.builds(
    Profile,
    name=st.just("d"),
    ingress=rule_lists,
    egress=rule_lists,
    labels=st.dictionaries(st.from_regex(r"\A[A-Za-z0-9_./-]{1,9}\Z"), label_texts, max_size=3),
)


@given(policies | profiles)
@settings(max_examples=150, deadline=None)
def test_encoded_resources_decode_to_themselves(resource: Resource) -> None:
    assert decode(json.loads(json.dumps(encode(resource))), stored=True) == resource


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = [
    (), ("order",), ("selector",), ("types",), ("ingress",), ("ingress", 0), ("ingress", 0, "protocol"),
    ("ingress", 0, "icmp"), ("ingress", 0, "source"), ("ingress", 0, "source", "ports"),
    ("ingress", 0, "source", "ports", 0), ("ingress", 0, "source", "nets"), ("ingress", 0, "source", "nets", 0),
]  # fmt: skip


@given(st.sampled_from(PATHS), json_values)
@settings(max_examples=500, deadline=None)
def test_anything_anywhere_is_decoded_or_refused(path: tuple[Any, ...], value: Any) -> None:
    rule = {"action": "Allow", "protocol": 6, "icmp": {}, "source": {"ports": [1], "nets": ["10.0.0.0/8"]}}
    if path[2:3] != ("icmp",):
        del rule["icmp"]
    document: Any = policy(order=1, selector="", types=["Ingress"], ingress=[rule])
    at, key = document, "spec"
    for step in path:
        at, key = at[key], step
    at[key] = value
    try:
        resource = decode(document)
    except ResourceError as error:
        assert str(error).isprintable() and len(str(error)) < 600
    else:
        assert decode(encode(resource), stored=True) == resource
