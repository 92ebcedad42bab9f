# Tiers, staged policies, network sets, host endpoints: from the operator's documents to the hosts that need them.
from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from dispatcher_rig import DB, WEB, Rack, document, guest, policy

from slash32 import resources
from slash32.net import parse_address, parse_prefix
from slash32.pack import AddressSet, Kind
from slash32.policy import HostEndpoint, Tier

OFFICE = 'net == "office"'
Document = dict[str, Any]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    rack = Rack(tmp_path_factory.mktemp("one"))
    rack.begin(1)
    yield rack
    rack.end()


def in_tier(tier: str, name: str, selector: str, source: str, staged: bool = False) -> Document:
    found = policy(name, selector, source)
    found["spec"]["tier"] = tier
    found["kind"] = "StagedGlobalNetworkPolicy" if staged else "GlobalNetworkPolicy"
    return found


def tier(name: str, order: float = 10) -> Document:
    return document("Tier", name, order=order, defaultAction="Pass")


def network_set(name: str, labels: dict[str, str], *nets: str) -> Document:
    found = document("GlobalNetworkSet", name, nets=list(nets))
    found["metadata"]["labels"] = labels
    return found


def card(name: str, node: str, labels: dict[str, str], interface: str = "eth0", **spec: Any) -> Document:
    found = document("HostEndpoint", name, node=node, interfaceName=interface, **spec)
    found["metadata"]["labels"] = labels
    return found


MODEL = (
    tier("platform"),
    tier("unused", 20),
    in_tier("platform", "allow-office", WEB, OFFICE),
    in_tier("platform", "allow-office", WEB, DB, staged=True),
    network_set("office", {"net": "office"}, "192.0.2.7/32", "198.51.100.0/24", "2001:db8::7/128"),
    card("h2-eth0", "h2", {"role": "uplink"}, expectedIPs=["192.0.2.99"], profiles=["cards"]),
    policy("uplinks", 'role == "uplink"', 'role == "uplink"'),
    document("Profile", "cards", labelsToApply={"rack": "7"}),
)


def refused(rack: Rack, *documents: Document) -> tuple[int, list[str]]:
    status, body = rack.dispatcher.call("POST", "/v1/apply", {"documents": list(documents)})
    assert status != 200
    return status, body["errors"]


def everything(rack: Rack) -> dict[str, Any]:
    return {kind: rack.dispatcher.get(f"/v1/resources/{kind}")["items"] for kind in resources.KINDS}


def on_disk(rack: Rack) -> list[Any]:
    """What is there now, without asking the dispatcher (which is stopped)."""
    with contextlib.closing(sqlite3.connect(rack.dispatcher.database)) as db:
        found = db.execute("select kind, key, value from records where kind = 'resource' order by key").fetchall()
        return [*found, *db.execute("select value from meta where key = 'revision'").fetchall()]


# --- what reaches whom -----------------------------------------------------------------------------------------------


def test_every_kind_reaches_the_hosts_that_need_it(rack: Rack) -> None:
    h1, h2, h3 = rack.begin(3)
    rack.answered(h1, h1.claim(guest(1, "web")))
    rack.settle()
    rack.dispatcher.apply(*MODEL)
    rack.settle()
    platform = {"platform": resources.decode(MODEL[0])}
    assert h1.objects(Kind.TIER) == platform and isinstance(platform["platform"], Tier), "no tier but the one it needs"
    assert set(h1.objects(Kind.POLICY)) == set(h1.objects(Kind.STAGED)) == {"allow-office"}
    staged = h1.get(Kind.STAGED, "allow-office")
    assert staged == resources.decode(MODEL[3]) and staged != h1.get(Kind.POLICY, "allow-office")
    office = AddressSet({parse_address("192.0.2.7"), parse_address("2001:db8::7")}, {parse_prefix("198.51.100.0/24")})
    assert h1.objects(Kind.SET) == {OFFICE: office, DB: AddressSet()}
    assert not h1.objects(Kind.HOSTENDPOINT)
    (found,) = h2.objects(Kind.HOSTENDPOINT).values()
    assert isinstance(found, HostEndpoint) and found == resources.decode(MODEL[5])
    assert set(h2.objects(Kind.POLICY)) == {"uplinks"} and set(h2.objects(Kind.PROFILE)) == {"cards"}
    assert h2.objects(Kind.SET) == {'role == "uplink"': AddressSet({parse_address("192.0.2.99")})}
    assert not any(h3.objects(kind) for kind in Kind if kind not in (Kind.HOST, Kind.ROUTE))
    status = rack.dispatcher.get("/v1/status")
    counted = ("tiers", "policies", "stagedPolicies", "profiles", "networkSets", "hostEndpoints")
    assert [status[word] for word in counted] == [2, 2, 1, 1, 1, 1]


def test_changes_of_the_new_kinds_travel_as_deltas(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    rack.answered(h1, h1.claim(guest(1, "web")))
    rack.dispatcher.apply(*MODEL)
    rack.settle()
    rack.dispatcher.apply(tier("platform", 99), network_set("office", {"net": "office"}, "198.51.100.9/32"))
    rack.settle()
    assert h1.get(Kind.TIER, "platform") == resources.decode(tier("platform", 99))
    assert h1.get(Kind.SET, OFFICE) == AddressSet({parse_address("198.51.100.9")})
    rack.dispatcher.apply(card("h2-eth0", "h1", {"role": "uplink"}))
    rack.settle()
    assert set(h1.objects(Kind.HOSTENDPOINT)) == {"h2-eth0"} and "uplinks" in h1.objects(Kind.POLICY)
    assert not any(h2.objects(kind) for kind in (Kind.HOSTENDPOINT, Kind.POLICY, Kind.SET, Kind.PROFILE))
    rack.dispatcher.apply(policy("racks", 'rack == "7"', WEB))
    rack.settle()
    assert "racks" not in h1.objects(Kind.POLICY)
    rack.dispatcher.apply(card("h2-eth0", "h1", {}, profiles=["cards"]))
    rack.settle()
    assert "racks" in h1.objects(Kind.POLICY) and "uplinks" not in h1.objects(Kind.POLICY), "labels of its profile"
    for kind, name in (("sgnp", "allow-office"), ("gnp", "allow-office"), ("tier", "platform"), ("hep", "h2-eth0")):
        assert rack.dispatcher.call("DELETE", f"/v1/resources/{kind}/{name}")[0] == 200
    assert rack.dispatcher.call("DELETE", "/v1/resources/gns/office")[0] == 200
    rack.settle()
    assert not any(h1.objects(kind) for kind in Kind if kind not in (Kind.HOST, Kind.ROUTE))


def test_a_host_endpoint_waits_for_its_host(rack: Rack) -> None:
    (h1,) = rack.begin(1)
    rack.dispatcher.apply(*MODEL, policy("who", WEB, 'role == "uplink"'))
    rack.answered(h1, h1.claim(guest(1, "web")))
    rack.settle()
    uplink = AddressSet({parse_address("192.0.2.99")})
    assert h1.get(Kind.SET, 'role == "uplink"') == uplink, "its address is known, host or not"
    rack.dispatcher.apply(card("h2-eth0", "h1", {"role": "uplink"}))
    rack.settle()
    spec = h1.resource()
    assert rack.dispatcher.call("DELETE", "/v1/resources/host/h1")[0] == 200
    rack.dispatcher.apply(spec)
    rack.until(lambda: h1.in_sync)
    rack.until(lambda: set(h1.objects(Kind.HOSTENDPOINT)) == {"h2-eth0"} and "uplinks" in h1.objects(Kind.POLICY))


def test_a_restart_finds_all_again(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    rack.answered(h1, h1.claim(guest(1, "web")))
    documents = list(MODEL)
    random.Random(7).shuffle(documents)
    rack.dispatcher.apply(*documents)
    rack.settle()
    before = everything(rack)
    content = [{kind: host.objects(kind) for kind in Kind} for host in (h1, h2)]
    for host in (h1, h2):
        host.events.clear()
    rack.dispatcher.kill()
    rack.dispatcher.start()
    rack.until(lambda: all(h["in_sync"] for h in rack.dispatcher.get("/v1/hosts")["items"]))
    assert everything(rack) == before and sum(map(len, before.values())) == len(MODEL) + 2
    assert [{kind: host.objects(kind) for kind in Kind} for host in (h1, h2)] == content
    host = h1.replica.load(h1.replica.dump())
    assert host.objects(Kind.TIER) == h1.objects(Kind.TIER) and host.objects(Kind.TIER)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_policy_needs_its_tier(one: Rack) -> None:
    missing = in_tier("nowhere", "p", WEB, WEB)
    line = 'GlobalNetworkPolicy p: spec.tier: tier "nowhere" does not exist: apply a Tier of that name first, or '
    line += "together with it"
    assert refused(one, missing) == (400, [line])
    assert refused(one, in_tier("nowhere", "p", WEB, WEB, staged=True)) == (400, [f"Staged{line}"])
    assert refused(one, missing, tier("elsewhere"))[0] == 400
    one.dispatcher.apply(missing, tier("nowhere"))  # in one go, whatever the order
    one.dispatcher.apply(in_tier("nowhere", "p", WEB, DB))
    one.dispatcher.apply(in_tier("default", "p2", WEB, DB))
    for kind, name in (("gnp", "p"), ("gnp", "p2"), ("tier", "nowhere")):
        assert one.dispatcher.call("DELETE", f"/v1/resources/{kind}/{name}")[0] == 200


def test_a_tier_that_is_needed_stays(one: Rack) -> None:
    one.dispatcher.apply(tier("needed"), *(in_tier("needed", f"n{n}", WEB, WEB, staged=n == 4) for n in range(5)))
    before = everything(one)

    def delete(kind: str, name: str) -> tuple[int, Any]:
        status, body = one.dispatcher.call("DELETE", f"/v1/resources/{kind}/{name}")
        return status, body.get("errors")

    users = "GlobalNetworkPolicy n0, GlobalNetworkPolicy n1, GlobalNetworkPolicy n2 and 2 more"
    assert delete("tier", "needed") == (
        409, [f"Tier needed: {users} name it: delete them first, or give them another spec.tier"],
    )  # fmt: skip
    assert everything(one) == before
    for n in range(4):
        assert delete("gnp", f"n{n}") == (200, None)
    assert delete("tier", "needed")[1] == [
        "Tier needed: StagedGlobalNetworkPolicy n4 name it: delete them first, or give them another spec.tier"
    ]
    assert delete("sgnp", "n4") == delete("tier", "needed") == (200, None)
    assert (delete("tier", "needed")[0], delete("tier", "default")[0]) == (404, 409)


def test_an_interface_has_one_host_endpoint(one: Rack) -> None:
    one.dispatcher.apply(card("first", "h1", {}))
    where = 'spec.interface: interface "eth0" of node h1'
    line = f"HostEndpoint second: {where} is that of HostEndpoint first already: delete one"
    assert refused(one, card("second", "h1", {})) == (400, [line])
    assert refused(one, card("x", "h7", {}, "*"), card("y", "h7", {}, "*"))[0] == 400
    one.dispatcher.apply(card("second", "h1", {}, "eth1"), card("third", "h2", {}), card("fourth", "h1", {}, "*"))
    swapped = card("first", "h1", {}, "eth1"), card("second", "h1", {})
    one.dispatcher.apply(*swapped)
    for name in ("first", "second", "third", "fourth"):
        assert one.dispatcher.call("DELETE", f"/v1/resources/hep/{name}")[0] == 200


@pytest.mark.parametrize(
    ("place", "bad", "says"),
    [
        (0, in_tier("nowhere", "bad", WEB, WEB), "spec.tier"),
        (49, in_tier("nowhere", "bad", WEB, WEB, staged=True), "spec.tier"),
        (20, policy("bad", "role = web", WEB), "spec.selector"),
        (49, card("bad", "h1", {}, "eth7"), "spec.interface"),
        (30, network_set("bad", {}, "10.0.0.0/33"), "spec.nets[0]"),
        (48, tier("default"), "always"),
    ],
)
def test_one_bad_document_of_fifty_changes_nothing(rack: Rack, place: int, bad: Document, says: str) -> None:
    rack.dispatcher.start()
    rack.dispatcher.apply(*MODEL, card("there", "h1", {}, "eth7"))
    before, revision = everything(rack), rack.dispatcher.get("/v1/status")["revision"]
    good = [in_tier("fresh", f"p{n}", WEB, WEB, staged=n % 2 == 1) for n in range(45)]
    good += [tier("fresh"), card("c", "h1", {}), tier("platform", 1)]
    good += [network_set("office", {"net": "changed"}, "10.0.0.0/8")]
    many = [*good[:place], bad, *good[place:]]
    assert len(many) == 50
    status, errors = refused(rack, *many)
    assert status == 400 and len(errors) == 1 and says in errors[0] and "\n" not in errors[0], errors
    assert everything(rack) == before and rack.dispatcher.get("/v1/status")["revision"] == revision
    rack.dispatcher.stop()
    disk = on_disk(rack)
    assert disk[-1] == (str(revision),) and len(disk) == len(MODEL) + 2
    rack.dispatcher.start()
    assert everything(rack) == before
    assert rack.dispatcher.apply(*good) == revision + 1  # the positive control
    rack.dispatcher.stop()
    assert len(on_disk(rack)) == len(disk) + 47 and on_disk(rack)[-1] == (str(revision + 1),)


def test_the_default_tier_as_calico_exports_it_changes_nothing(rack: Rack) -> None:
    rack.dispatcher.start()
    exported = tier("default", 1_000_000)
    exported["spec"]["defaultAction"] = "Deny"
    before = rack.dispatcher.get("/v1/status")["revision"]
    assert rack.dispatcher.apply(exported) == before
    assert rack.dispatcher.apply(tier("other")) == before + 1
