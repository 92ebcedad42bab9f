# Documents <-> model: what is accepted (corpus), what is refused and with which line (tables), and round trips.
from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slash32.documents import dump_yaml
from slash32.errors import ResourceError
from slash32.model import Host
from slash32.net import parse_address, parse_prefix
from slash32.policy import (
    THE_DEFAULT_TIER,
    Action,
    Direction,
    HostEndpoint,
    Icmp,
    NetworkSet,
    Peer,
    Policy,
    PortRange,
    Profile,
    Rule,
    Tier,
)
from slash32.resources import KINDS, Resource, decode, encode, find_kind, kind_of, load_yaml
from slash32.selector import parse

CORPUS = Path(__file__).parent / "corpus" / "ok"
FILES = sorted([*CORPUS.glob("*.yaml"), *(Path(__file__).parents[3] / "examples").glob("*.yaml")])
KEY = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"


def policy(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "GlobalNetworkPolicy", "metadata": {"name": "p"}, "spec": spec}


def ingress(**rule: Any) -> dict[str, Any]:
    return policy(ingress=[{"action": "Allow", **rule}])


def host(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "Host", "metadata": {"name": "h1"}, "spec": spec}


def profile(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "Profile", "metadata": {"name": "d"}, "spec": spec}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_corpus_is_accepted_and_round_trips(path: Path) -> None:
    documents = load_yaml(path.read_text(), path.name)
    assert documents
    for document in documents:
        resource = decode(document)
        encoded = encode(resource)
        assert decode(json.loads(json.dumps(encoded))) == resource
        assert encode(decode(encoded)) == encoded


def test_a_policy_in_full() -> None:
    web = decode(load_yaml((CORPUS / "web.yaml").read_text(), "web.yaml")[0])
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
    documents = load_yaml((CORPUS / "web.yaml").read_text(), "web.yaml")
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


def tier(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "Tier", "metadata": {"name": "t"}, "spec": spec}


def network_set(labels: dict[str, str], nets: list[str] | None = None) -> dict[str, Any]:
    metadata = {"name": "s", "labels": labels}
    return {"apiVersion": "slash32/v1", "kind": "GlobalNetworkSet", "metadata": metadata, "spec": {"nets": nets or []}}


def host_endpoint(**spec: Any) -> dict[str, Any]:
    spec = {"node": "hv1", "interfaceName": "eth0", **spec}
    return {"apiVersion": "slash32/v1", "kind": "HostEndpoint", "metadata": {"name": "e"}, "spec": spec}


def with_metadata(**metadata: Any) -> dict[str, Any]:
    return {**policy(), "metadata": metadata}


# What YAML cannot say, or only at length; all the rest of what is refused is in corpus/bad (test_corpus).
REFUSED: list[tuple[dict[str, Any], str]] = [
    (policy(order=float("nan")), "spec.order: is not a finite number; give"),
    (policy(order=float("-inf")), "spec.order: is not a finite number; give"),
    (policy(order=10**400), "spec.order: is not a finite number; give"),
    (tier(order=float("inf")), "spec.order: is not a finite number; give"),
    (profile(labelsToApply={1: "x"}), "spec.labelsToApply: the key 1 is not a string"),
    (policy(**{"\ud800": 1}), 'spec."\\ud800": unknown field'),
    (ingress(protocol=6.0), "protocol: 6.0 is not a protocol"),
    (ingress(ipVersion=4.0), "ipVersion: 4.0 is not an IP version"),
    (ingress(protocol="TCP", source={"ports": [80.0]}), "source.ports[0]: 80.0 is not a port: give"),
    (ingress(protocol="TCP", source={"ports": [1] * 257}), "source.ports: has 257 entries; give at most 256"),
    (ingress(source={"nets": ["10.0.0.0/8"] * 257}), "source.nets: has 257 entries; give at most 256"),
    (ingress(source={"notNets": ["::/1"] * 257}), "source.notNets: has 257 entries; give at most 256"),
    (ingress(source={"selector": "x" * 1025}), "source.selector: has 1025 characters; give at most 1024"),
    (network_set({"a" * 513: "x"}), "is not a label name: use 1 to 512 letters"),
    (network_set({f"k{n}": "" for n in range(129)}), "metadata.labels: has 129 labels; give at most 128"),
    (profile(labelsToApply={f"k{n}": "" for n in range(129)}), "spec.labelsToApply: has 129 labels; give at most 128"),
    (network_set({}, ["10.0.0.1"] * 100_001), "spec.nets: has 100001 entries; give at most 100000"),
]


@pytest.mark.parametrize(("document", "line"), REFUSED)
def test_refusals_are_one_line_that_names_the_field(document: dict[str, Any], line: str) -> None:
    with pytest.raises(ResourceError) as caught:
        decode(document)
    text = str(caught.value)
    assert line in text
    assert text.isprintable() and len(text) < 400


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
        ingress(source={"nets": ["10.0.0.0/8"], "notNets": ["10.0.0.0/9", "10.128.0.0/9"]}),
        ingress(source={"notNets": ["0.0.0.0/0"]}),
        ingress(protocol="tcp", source={"ports": ["1:10", 20], "notPorts": ["2:10"]}),
        ingress(protocol="ICMP", icmp={"type": 8}, notICMP={"type": 8, "code": 0}),
        ingress(protocol="TCP", notProtocol="UDP", source={"selector": "has(a)", "notSelector": "has(b)"}),
        ingress(source={"notSelector": "all()"}),
        ingress(metadata={"annotations": {"a": 1}}),
        policy(order=-1e308, tier="x" * 63, types=["Egress"], egress=[{"action": "Log"}] * 1024),
        with_metadata(name="p", labels={"projectcalico.org/tier": "default"}, creationTimestamp=None),
        tier(),
        tier(order=-5, defaultAction="Pass"),
        network_set({}, []),
        network_set({"a/b.c-D_": ""}, ["0.0.0.0/0", "::/0", "192.0.2.1", "192.0.2.1/32", "fd00::/8"]),
        host_endpoint(),
        host_endpoint(interfaceName="*", expectedIPs=[f"10.0.0.{n}" for n in range(64)]),
        host_endpoint(interfaceName="br-lan.100@eth0", profiles=[f"p{n}" for n in range(16)]),
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


def test_the_other_kinds_in_full() -> None:
    documents = load_yaml((CORPUS / "calico.yaml").read_text(), "calico.yaml")
    usual, platform, last, bad_nets, staged, network_set, eth0, everything, ours = map(decode, documents)
    assert usual == THE_DEFAULT_TIER
    assert platform == Tier("platform", 200.0, Action.PASS)
    assert last == Tier("last", None, Action.DENY)
    bad = Peer(selector='reputation == "bad"')
    assert bad_nets == Policy(
        name="platform.block-bad-nets",
        selector="has(role)",
        types=(Direction.INGRESS,),
        order=10.0,
        ingress=(Rule(Action.LOG, protocol=136, source=bad), Rule(Action.DENY, source=bad), Rule(Action.PASS)),
        tier="platform",
        apply_on_forward=True,
    )
    ssh = Rule(Action.DENY, protocol=6, destination=Peer(ports=(PortRange(22, 22),)))
    assert staged == Policy("try-deny-ssh", "all()", (Direction.INGRESS,), ingress=(ssh,), staged=True)
    nets = ("198.51.100.0/24", "203.0.113.7/32", "2001:db8:bad::/48")
    assert network_set == NetworkSet("bad-nets", {"reputation": "bad"}, tuple(map(parse_prefix, nets)))
    labels = {"role": "hypervisor", "projectcalico.org/created-by": "calico-kube-controllers"}
    addresses = (parse_address("192.0.2.11"), parse_address("2001:db8::11"))
    assert eth0 == HostEndpoint("hv1-eth0", "hv1", "eth0", labels, addresses, ("projectcalico-default-allow",))
    assert everything == HostEndpoint("hv1-any", "hv1", "*")
    egress = (Rule(Action.PASS, not_protocol=132),)
    assert ours == Policy("ours", "all()", (Direction.EGRESS,), 1000.0, egress=egress, keep_established=True)


def test_kinds_and_places_of_a_list() -> None:
    documents = load_yaml((CORPUS / "calico.yaml").read_text(), "calico.yaml")
    assert [kind_of(decode(d)) for d in documents] == [
        *["Tier"] * 3, "GlobalNetworkPolicy", "StagedGlobalNetworkPolicy", "GlobalNetworkSet", *["HostEndpoint"] * 2,
        "GlobalNetworkPolicy",
    ]  # fmt: skip
    assert [d.path for d in documents] == ["items[0]", "items[1]", "items[2]", "items[0]", "", "", "", "", ""]


def test_what_is_default_is_not_written() -> None:
    """As Calico: a document that says it and one that does not are one."""
    plain = policy(selector="all()", types=["Ingress"], ingress=[])
    said = policy(**plain["spec"], tier="default", applyOnForward=False, keepEstablished=False)
    assert decode(said) == decode(plain)
    assert encode(decode(said)) == plain
    assert encode(decode(tier())) == tier(defaultAction="Deny")


def test_addresses_of_a_set_are_written_as_calico_writes_them() -> None:
    document = network_set({"a": "b"}, ["192.0.2.1", "10.0.0.0/8", "fd00::1", "fd00::/64"])
    assert encode(decode(document)) == document


@pytest.mark.parametrize(
    "rule",
    [
        {"action": "Allow", "protocol": "TCP", "notProtocol": 6},
        {"action": "Allow", "ipVersion": 4, "source": {"notNets": ["0.0.0.0/0"]}},
        {"action": "Deny", "source": {"selector": "has(a)", "notSelector": "has(a)"}},
        {"action": "Deny", "protocol": "UDP", "source": {"ports": [1], "notPorts": [1]}},
        {"action": "Deny", "protocol": "ICMP", "icmp": {"type": 8}, "notICMP": {"type": 8}},
    ],
)
def test_a_store_from_before_a_check_of_sense_still_loads(rule: dict[str, Any]) -> None:
    """0.1.0 took these; a dispatcher that no longer starts would be worse than a rule that matches nothing."""
    with pytest.raises(ResourceError, match="could never match"):
        decode(policy(ingress=[rule]))
    assert decode(policy(ingress=[rule]), stored=True)


WORDS = {
    "GlobalNetworkPolicy": "gnp GNP policy policies globalnetworkpolicies globalnetworkpolicy",
    "StagedGlobalNetworkPolicy": "sgnp stagedglobalnetworkpolicies StagedGlobalNetworkPolicy",
    "Tier": "tier tiers TIER",
    "GlobalNetworkSet": "gns globalnetworksets globalnetworkset",
    "HostEndpoint": "hep hostendpoints HostEndpoint",
    "Profile": "prof profile profiles",
    "Host": "host hosts",
}


def test_find_kind() -> None:
    for kind, words in WORDS.items():
        assert [find_kind(word) for word in words.split()] == [KINDS[kind]] * len(words.split())
    assert list(WORDS) == list(KINDS)
    assert [find_kind(word) for word in ("pods", "", "g", "endpoint", "networkpolicy")] == [None] * 5


# --- generated resources round-trip

versions4 = st.builds(lambda n, bits: parse_prefix(f"{n}.0.0.0/{bits}"), st.integers(1, 223), st.integers(8, 32))
versions6 = st.builds(lambda n, bits: parse_prefix(f"fd00:{n:x}::/{bits}"), st.integers(0, 65535), st.integers(32, 128))
nets = st.lists(versions4 | versions6, max_size=3).map(tuple)
selectors = st.none() | st.sampled_from(["all()", 'a == "b"', '(has(a) && !has(b))', "a in {}", "a == 'q\"'"])
ports = st.lists(
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda p: PortRange(min(p), max(p))), max_size=3
).map(tuple)
icmps = st.none() | st.builds(Icmp, st.integers(0, 254), st.none() | st.integers(0, 255))


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    protocol = draw(st.none() | st.sampled_from([1, 6, 17, 58, 132, 136, 255]))
    with_icmp, with_ports = protocol in (1, 58), protocol in (6, 17, 132, 136)

    def peer() -> Peer:
        return Peer(
            selector=draw(selectors),
            not_selector=draw(selectors),
            ports=draw(ports) if with_ports else (),
            not_ports=draw(ports) if with_ports else (),
            nets=draw(nets),
            not_nets=draw(nets),
        )

    return Rule(
        action=draw(st.sampled_from(Action)),
        protocol=protocol,
        not_protocol=draw(st.none() | st.integers(1, 255)),
        ip_version=draw(st.none() | st.sampled_from([4, 6])),
        icmp=draw(icmps) if with_icmp else None,
        not_icmp=draw(icmps) if with_icmp else None,
        source=peer(),
        destination=peer(),
    )


names = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?(\.[a-z0-9]{1,3})?\Z")
orders = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9).map(float)
label_texts = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=5)
labels = st.dictionaries(st.from_regex(r"\A[A-Za-z0-9_./-]{1,9}\Z"), label_texts, max_size=3)
addresses = st.lists(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16), max_size=3, unique=True)
rule_lists = st.lists(rules(), max_size=3).map(tuple)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    types = draw(st.sampled_from([(Direction.INGRESS,), (Direction.EGRESS,), tuple(Direction)]))
    return Policy(
        name=draw(names),
        selector=draw(selectors.filter(bool)),
        types=types,
        order=draw(orders),
        ingress=draw(rule_lists) if Direction.INGRESS in types else (),
        egress=draw(rule_lists) if Direction.EGRESS in types else (),
        tier=draw(st.just("default") | names),
        apply_on_forward=draw(st.booleans()),
        keep_established=draw(st.booleans()),
        staged=draw(st.booleans()),
    )


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    both = draw(st.tuples(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)))
    values = st.dictionaries(st.sampled_from("ab"), st.lists(label_texts, max_size=2).map(tuple))
    key = draw(st.sampled_from(["", KEY]))
    return Host(draw(names), key, draw(st.sampled_from([(), both, both[:1], both[1:]])), draw(nets), draw(values))


RESOURCES = {
    "GlobalNetworkPolicy": policies(),
    "StagedGlobalNetworkPolicy": policies(),
    "Tier": st.builds(
        Tier, names.filter(lambda name: name != "default"), orders, st.sampled_from([Action.DENY, Action.PASS])
    ),
    "GlobalNetworkSet": st.builds(
        NetworkSet, names, labels, st.lists(versions4 | versions6, unique=True, max_size=9).map(tuple)
    ),
    "HostEndpoint": st.builds(
        HostEndpoint,
        names,
        names,
        st.just("*") | st.from_regex(r"\A[a-z][A-Za-z0-9_.@-]{2,14}\Z"),
        labels,
        addresses.map(tuple),
        st.lists(names, unique=True, max_size=3).map(tuple),
    ),
    "Profile": st.builds(Profile, names, rule_lists, rule_lists, labels),
    "Host": hosts(),
}


def test_every_kind_is_generated() -> None:
    assert list(RESOURCES) == list(KINDS)


@given(st.one_of(*RESOURCES.values()))
@settings(max_examples=300, deadline=None)
def test_encoded_resources_decode_to_themselves(resource: Resource) -> None:
    encoded = encode(resource)
    assert decode(json.loads(json.dumps(encoded)), stored=True) == resource
    assert encode(decode(encoded, stored=True)) == encoded
    (document,) = load_yaml(dump_yaml(encoded), "dumped")
    assert decode(document, stored=True) == resource


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
RULE = {"action": "Allow", "protocol": 6, "source": {"ports": [1], "nets": ["10.0.0.0/8"]}}
WHOLE = {
    "GlobalNetworkPolicy": {"order": 1, "selector": "", "types": ["Ingress"], "ingress": [RULE], "tier": "t",
                            "applyOnForward": True, "keepEstablished": False},
    "StagedGlobalNetworkPolicy": {"stagedAction": "Set", "ingress": [RULE]},
    "Tier": {"order": 1, "defaultAction": "Pass"},
    "GlobalNetworkSet": {"nets": ["10.0.0.1"]},
    "HostEndpoint": {"node": "h", "interfaceName": "eth0", "expectedIPs": ["10.0.0.1"], "profiles": ["p"]},
    "Profile": {"egress": [RULE], "labelsToApply": {"a": "b"}},
    "Host": {"publicKey": KEY, "addresses": ["10.0.0.1"], "nets": ["10.0.0.0/8"], "labels": {"a": ["b"]}},
}  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key) in it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from places(inner)


@given(st.sampled_from(list(WHOLE)), st.integers(0), json_values)
@settings(max_examples=500, deadline=None)
def test_anything_anywhere_is_decoded_or_refused(kind: str, which: int, value: Any) -> None:
    metadata = {"name": "n", "annotations": {}}
    document = copy.deepcopy({"apiVersion": "slash32/v1", "kind": kind, "metadata": metadata, "spec": WHOLE[kind]})
    decode(document)
    found = list(places(document))
    at, key = found[which % len(found)]
    at[key] = value
    try:
        resource = decode(document)
    except ResourceError as error:
        assert str(error).isprintable() and len(str(error)) < 400
    else:
        assert decode(encode(resource), stored=True) == resource
