# Worlds from YAML: what is taken, wherever its writer put it; what is refused, with object and path.
from __future__ import annotations

import json
from typing import Any

import pytest

from slash32.documents import load_yaml
from slash32.errors import ResourceError
from slash32.model import SharedAddress
from slash32.net import format_address, parse_address, parse_prefix
from slash32.verdict import World
from slash32.worldfile import read_world

WEB = {
    "apiVersion": "slash32/v1",
    "kind": "Endpoint",
    "metadata": {"name": "web1", "labels": {"role": "web"}},
    "spec": {"host": "h1", "addresses": ["10.0.0.1", "fd00::1"], "profiles": ["default"]},
}
TIER = {"apiVersion": "slash32/v1", "kind": "Tier", "metadata": {"name": "t"}, "spec": {"order": 1}}


def policy(name: str = "p", kind: str = "GlobalNetworkPolicy", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": {"selector": "all()", **spec}}


def endpoint(name: str = "db1", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "Endpoint", "metadata": {"name": name}, "spec": spec}


def host_endpoint(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "slash32/v1",
        "kind": "HostEndpoint",
        "metadata": {"name": name},
        "spec": {"node": "h1", "interfaceName": "eth0", **spec},
    }


def world(*documents: Any) -> World:
    text = "\n---\n".join(json.dumps(each) for each in documents)
    return read_world(load_yaml(text, "w.yaml"))


def refused(*documents: Any) -> str:
    with pytest.raises(ResourceError) as caught:
        world(*documents)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def test_an_endpoint() -> None:
    found = world(WEB)
    (web,) = found.endpoints
    assert (web.domain, web.labels, web.profiles) == ("web1", {"role": "web"}, ("default",))
    assert list(map(format_address, web.addresses)) == ["10.0.0.1", "fd00::1"]
    assert found.places == {web.key: "h1"}


EVERYWHERE = {"labels": {"role": "web"}, "addresses": ["10.0.0.1", "fd00::1"], "host": "h1", "profiles": ["default"]}


@pytest.mark.parametrize(
    "written",
    [
        {"metadata": {"name": "web1"}, "spec": EVERYWHERE},
        {"metadata": {"name": "web1"}, **EVERYWHERE},
        {"name": "web1", **EVERYWHERE},
        {"spec": {"name": "web1", **EVERYWHERE}},
        {"metadata": {"name": "web1", "labels": EVERYWHERE["labels"], "uid": "x"}, "spec": EVERYWHERE},
        {"metadata": {"name": "web1"}, "spec": {**{k: v for k, v in EVERYWHERE.items() if k != "host"}, "node": "h1"}},
        {"metadata": {"name": "web1"}, "spec": {**EVERYWHERE, "node": "h1"}},
    ],
)
@pytest.mark.parametrize("version", ["slash32/v1", "projectcalico.org/v3"])
def test_fields_may_stand_where_one_looks_for_them(written: dict[str, Any], version: str) -> None:
    found, same = world({"apiVersion": version, "kind": "Endpoint", **written}), world(WEB)
    assert found == same


def test_an_address_may_say_that_it_is_one() -> None:
    found = world(endpoint(addresses=["10.0.0.1/32", "fd00::1/128"]))
    assert found.endpoints[0].addresses == world(WEB).endpoints[0].addresses


def test_labels_of_both_places_merge() -> None:
    web = {**WEB, "spec": {"labels": {"env": "prod", "role": "web"}}}
    assert world(web).endpoints[0].labels == {"role": "web", "env": "prod"}
    web = {**WEB, "spec": {"labels": {"role": "db"}}}
    assert refused(web) == ('w.yaml:1: Endpoint web1: spec.labels.role: "db", but "web" in metadata.labels; keep one')


def test_everything_an_endpoint_may_have() -> None:
    one = endpoint("a", shared=[{"address": "10.9.0.1", "group": "vip"}], prefixes=["10.66.0.0/26"])
    two = endpoint("b", shared=[{"address": "10.9.0.1", "group": "vip"}], addresses=["10.66.0.1"])
    found = world(one, two)
    assert [e.shared for e in found.endpoints] == [(SharedAddress(parse_address("10.9.0.1"), "vip"),)] * 2
    assert found.endpoints[0].prefixes == (parse_prefix("10.66.0.0/26"),)
    assert found.places == {} and len({e.key for e in found.endpoints}) == 2


def test_every_kind_of_policy_finds_its_place() -> None:
    profile = {"apiVersion": "slash32/v1", "kind": "Profile", "metadata": {"name": "d"}, "spec": {}}
    networks = {"apiVersion": "slash32/v1", "kind": "GlobalNetworkSet", "metadata": {"name": "s"}, "spec": {"nets": []}}
    host = {"apiVersion": "slash32/v1", "kind": "Host", "metadata": {"name": "h1"}, "spec": {}}
    staged = policy("p", "StagedGlobalNetworkPolicy", tier="t")
    found = world(policy(tier="t"), staged, profile, networks, host, host_endpoint("e"), WEB, TIER)
    assert [(p.name, p.staged, p.tier) for p in found.policies] == [("p", False, "t"), ("p", True, "t")]
    names = [[each.name for each in some] for some in (found.profiles, found.tiers, found.sets, found.host_endpoints)]
    assert names == [["d"], ["t"], ["s"], ["e"]]


def test_what_slash32_get_endpoints_prints() -> None:
    item = {
        "uuid": "6f1b0c9e-0000-4000-8000-000000000001", "mac": "52:54:00:00:00:02", "domain": "web1", "host": "h1",
        "labels": {"role": "web"}, "effectiveLabels": {"role": "web", "zone": "x"}, "profiles": ["default"],
        "addresses": ["10.0.0.1"], "shared": [{"address": "10.9.0.1", "group": "vip"}], "prefixes": ["10.66.0.0/26"],
    }  # fmt: skip
    second = {**item, "mac": "52:54:00:00:00:03", "addresses": ["10.0.0.2"], "prefixes": []}
    found = world({"apiVersion": "slash32/v1", "kind": "List", "items": [item, second]})
    assert [e.domain for e in found.endpoints] == ["web1", "web1"]
    assert [e.key.mac for e in found.endpoints] == ["52:54:00:00:00:02", "52:54:00:00:00:03"]
    assert found.endpoints[0].labels == {"role": "web"} and len(found.places) == 2
    listed = {"apiVersion": "slash32/v1", "kind": "List", "items": [item, {**second, "mac": item["mac"]}]}
    assert "is given before" in refused(listed)
    assert "effectiveLabels: unknown field" in refused({**WEB, "effectiveLabels": {}})  # only in an export


REFUSED: dict[str, tuple[list[Any], str]] = {
    "no name": ([{**WEB, "metadata": {}}], "Endpoint: metadata.name is missing; add it"),
    "an empty name": ([{**WEB, "metadata": {"name": ""}}], 'Endpoint "": metadata.name: is empty'),
    "a name that is no text": ([{**WEB, "metadata": {"name": 5}}], "metadata.name: 5 is not a string"),
    "two names": ([{**WEB, "name": "web2"}], "metadata.name: says something else than name; keep one"),
    "host and node": ([endpoint(host="h1", node="h2")], "spec.node: says something else than spec.host; keep one"),
    "addresses twice": ([{**WEB, "addresses": ["10.0.0.9"]}], "spec.addresses: says something else than addresses"),
    "no version": ([{k: v for k, v in WEB.items() if k != "apiVersion"}], "Endpoint web1: apiVersion is missing"),
    "another version": ([{**WEB, "apiVersion": "v1"}], 'apiVersion: "v1" is not known here'),
    "an unknown field": ([endpoint(adresses=[])], "spec.adresses: unknown field (did you mean addresses?)"),
    "beside spec": ([{**WEB, "specs": {}}], "Endpoint web1: specs: unknown field (did you mean spec?)"),
    "status": ([{**WEB, "status": {}}], "Endpoint web1: status: is not supported"),
    "a namespace": ([{**WEB, "metadata": {"name": "w", "namespace": "x"}}], "metadata.namespace: is not supported"),
    "an address that is none": ([endpoint(addresses=["10.0.0"])], 'Endpoint db1: spec.addresses[0]: "10.0.0" is'),
    "an address with a mask": ([endpoint(addresses=["10.0.0.1/24"])], "spec.addresses[0]: "),
    "a long mask of the other family": ([endpoint(addresses=["fd00::/32"])], "spec.addresses[0]: "),
    "no list": ([endpoint(addresses="10.0.0.1")], 'spec.addresses: "10.0.0.1" is not a list'),
    "nobody's address": ([endpoint(addresses=["127.0.0.1"])], "spec.addresses[0]: 127.0.0.1 is loopback"),
    "nobody's prefix": ([endpoint(prefixes=["224.0.0.0/8"])], "spec.prefixes[0]: 224.0.0.0/8 is multicast"),
    "an address twice": ([endpoint(addresses=["10.0.0.1"] * 2)], "addresses[1]: 10.0.0.1 is taken by this endpoint"),
    "an address of two": (
        [WEB, endpoint(addresses=["10.0.0.9", "fd00:0::1"])],
        "Endpoint db1: spec.addresses[1]: fd00::1 is taken by w.yaml:1: Endpoint web1; give another",
    ),
    "own and shared": ([WEB, endpoint(shared=[{"address": "10.0.0.1", "group": "g"}])], "shared[0]: 10.0.0.1 is"),
    "another group": (
        [endpoint(n, shared=[{"address": "10.9.0.1", "group": n}]) for n in ("a", "b")],
        'Endpoint b: spec.shared[0]: 10.9.0.1 is taken by w.yaml:1: Endpoint a, shared in group "a"',
    ),
    "shared without group": ([endpoint(shared=[{"address": "10.9.0.1"}])], "spec.shared[0]: group is missing"),
    "a prefix of two": ([endpoint(n, prefixes=["10.66.0.0/26"]) for n in "ab"], "b: spec.prefixes[0]: 10.66.0.0/26"),
    "a label's value": ([endpoint(labels={"a": 5})], "spec.labels.a: 5 is not a string"),
    "a label's name": ([endpoint(labels={"a b": "c"})], "is not a label name"),
    "a name given twice": ([WEB, {**WEB, "spec": {}}], 'Endpoint "web1" is given before, in w.yaml:1: Endpoint web1'),
    "a policy given twice": ([policy(), policy()], 'metadata.name: GlobalNetworkPolicy "p" is given before'),
    "no such tier": ([TIER, policy(tier="u")], 'GlobalNetworkPolicy p: spec.tier: there is no Tier "u"; add'),
    "no such tier, staged": ([policy("s", "StagedGlobalNetworkPolicy", tier="u")], "s: spec.tier: there is no Tier"),
    "an interface twice": ([host_endpoint("a"), host_endpoint("b")], "HostEndpoint b: spec.interfaceName: interface"),
    "a guest's address": (
        [host_endpoint("a", expectedIPs=["10.0.0.1"]), WEB],
        "HostEndpoint a: spec.expectedIPs: 10.0.0.1 is taken by w.yaml:3: Endpoint web1",
    ),
    "a policy that is wrong": ([policy(selector="a = b")], "GlobalNetworkPolicy p: spec.selector: "),
    "an unknown kind": ([{**WEB, "kind": "Endpiont"}], 'kind: "Endpiont" is not known here'),
    "hostile": ([endpoint("a\x1b[31m\nb" * 100, addresses=["\x1b"])], "is not a string"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_object_and_path(case: str) -> None:
    documents, message = REFUSED[case]
    found = refused(*documents)
    if case == "hostile":
        assert "\x1b" not in found and "\\x1b" in found
    else:
        assert message in found and found.startswith("w.yaml:")


def test_the_controls() -> None:
    """What the refused would be if they were right."""
    world(WEB, TIER, policy(tier="t"), policy("default", tier="default"), endpoint(addresses=["10.0.0.2"]))
    world(host_endpoint("a", expectedIPs=["10.0.0.1"]), host_endpoint("b", interfaceName="eth1"))
    world(endpoint("Any Name, as libvirt lets it be"), endpoint(profiles=["missing"]))
    assert world() == World([], (), (), (), (), (), {})


def test_ten_thousand_endpoints() -> None:
    """Nothing in it is quadratic: a thousand times what one costs is not a thousand thousand."""
    text = "\n---\n".join(
        f"{{apiVersion: slash32/v1, kind: Endpoint, name: g{n}, spec: {{addresses: [10.{n >> 8}.{n & 255}.1]}}}}"
        for n in range(10_000)
    )
    assert len(read_world(load_yaml(text, "w.yaml")).endpoints) == 10_000
