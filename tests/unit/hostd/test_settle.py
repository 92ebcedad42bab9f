# What the kernel's notifications undo is done again, and nothing else is written: on the model kernel.
from __future__ import annotations

from dataclasses import replace

import pytest

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.desired import Dirty
from hostd.compiler.forwarding import GATEWAY4_ROUTE, Link, Neighbour, Route
from hostd.compiler.ruleset import Guard, SetKind, SetSpec
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import Prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.policy import Action, Direction, Peer, Policy, Rule
from tests.fake_kernel import FakeKernel, Model
from tests.scenes import Commit, Run, Scene, key

BASE = Guard().group_base
TAP, UPLINK = 100, 3
FAR, NEXT_HOP = parse_prefix("10.65.0.99"), parse_address("192.0.2.2")
ENDPOINTS = Rule(Action.ALLOW, source=Peer(selector="all()"))
WEB = Policy("web", "all()", tuple(Direction), ingress=(ENDPOINTS,), egress=(Rule(Action.ALLOW),))


class Host:
    """One guest on vnet100, one remote guest behind h2."""

    def __init__(self) -> None:
        self.scene = Scene()
        links = {i: Link(i, name, 0, bytes(6), True) for i, name in ((TAP, "vnet100"), (UPLINK, "eth0"))}
        self.model = Model(links=links)
        self.kernel = FakeKernel(self.model)
        self.settler = Settler(self.kernel, self.scene.calc, Limits(BASE), ("vnet",))
        self.settler.resync()
        guest = Endpoint(key(0), "guest", {}, (), (parse_address("10.65.0.1"), parse_address("fd00::1")))
        self.local = Local(guest, "qemu", Phase.LIVE, Carrier("vnet100", TAP), guest)
        everything = AddressSet({parse_address("10.65.0.1")})
        self.scene.take(Commit((
            (ObjectKey(Kind.POLICY, "web"), WEB), (ObjectKey(Kind.SET, "all()"), everything),
            (ObjectKey(Kind.HOST, "h2"), (NEXT_HOP,)), (ObjectKey(Kind.ROUTE, FAR), ("h2",)),
        )))  # fmt: skip
        self.scene.take(Run(0, self.local))
        self.settle()
        assert self.settler.failures() == [] and self.model.links[TAP].group == BASE + 1

    def settle(self, dirty: Dirty | None = None) -> int:
        """Returns how much was written."""
        self.scene.absorb()
        todo, self.scene.dirty = self.scene.dirty, Dirty()
        todo.merge(dirty or Dirty())
        before = self.model.writes
        self.settler.settle(todo)
        return self.model.writes - before

    def remote(self, hosts: tuple[str, ...] | None) -> None:
        self.scene.take(Commit(((ObjectKey(Kind.ROUTE, FAR), hosts),)))

    def whole(self) -> bool:
        return list(self.settler.pending()) == [] and self.settler.failures() == []


@pytest.fixture
def host() -> Host:
    return Host()


def route(prefix: Prefix, oif: int, via: bytes | None = None) -> Route:
    return Route(prefix, oif, via)


OWN = parse_prefix("10.65.0.1")
CASES = {
    "a group of somebody's": lambda h: h.model.links.update({TAP: h.model.links[TAP]._replace(group=7)})
    or h.settler.link_seen(h.model.links[TAP]),
    "a route is gone": lambda h: h.model.routes.remove(route(OWN, TAP)) or h.settler.route_gone(route(OWN, TAP)),
    "a remote route is gone": lambda h: h.model.routes.remove(route(FAR, 0, NEXT_HOP))
    or h.settler.route_gone(route(FAR, UPLINK, NEXT_HOP)),
    "a route that says it is ours": lambda h: h.model.routes.add(route(parse_prefix("10.1.1.1"), UPLINK))
    or h.settler.route_seen(route(parse_prefix("10.1.1.1"), UPLINK)),
    "one beside ours": lambda h: h.model.routes.add(route(OWN, UPLINK)) or h.settler.route_seen(route(OWN, UPLINK)),
    "one in the place of ours": lambda h: h.model.routes.remove(route(OWN, TAP))
    or h.model.routes.add(route(OWN, UPLINK))
    or h.settler.route_seen(route(OWN, UPLINK)),
    "a neighbour is gone": lambda h: h.model.neighbours.remove((TAP, OWN.network, b"\x52\x54\0\0\0\0"))
    or h.settler.neighbour_gone(Neighbour(TAP, OWN.network, b"")),
    "the gateway is gone": lambda h: h.model.gateways.clear() or h.settler.gateway_gone(TAP),
    "sysctls changed": lambda h: h.model.sysctls.clear() or h.settler.sysctls_changed(TAP),
    "sysctls changed in silence": lambda h: h.model.sysctls.clear() or h.settler.audit(),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_undone_is_done_again(host: Host, case: str) -> None:
    dirty = CASES[case](host)
    assert dirty
    assert host.settle(dirty) > 0
    assert host.whole()
    assert host.settle(CASES["sysctls changed in silence"](host)) == 1


def test_what_we_did_ourselves_is_nothing_to_heal(host: Host) -> None:
    """Notifications come late: each is compared with what holds now."""
    late = [host.model.links[TAP]._replace(group=0), host.model.links[TAP]]
    for link in late:
        assert not host.settler.link_seen(link)
    assert not host.settler.route_seen(route(OWN, TAP))
    assert not host.settler.route_seen(route(FAR, UPLINK, NEXT_HOP))
    assert not host.settler.sysctls_changed(TAP)


def test_routes_leave_a_tap_that_goes_down_and_come_back(host: Host) -> None:
    down = host.model.links[TAP]._replace(up=False)
    host.model.routes -= {r for r in host.model.routes if r.oif == TAP and r.prefix.version == 4}
    assert not host.settler.link_seen(down)
    assert host.settle(host.settler.link_seen(down._replace(up=True))) == 1
    assert host.whole()


@pytest.mark.parametrize("lost", [True, False], ids=["the kernel dropped them", "they took another way"])
@pytest.mark.parametrize("end", ["up", "gone"])
def test_routes_to_next_hops_when_some_link_was_down(host: Host, lost: bool, end: str) -> None:
    far = route(FAR, 0, NEXT_HOP)
    assert not host.settler.link_seen(host.model.links[UPLINK]._replace(up=False))
    if lost:
        host.model.routes.remove(far)
    dirty = host.settler.link_gone(UPLINK) if end == "gone" else host.settler.link_seen(host.model.links[UPLINK])
    assert host.settle(dirty) == lost
    assert far in host.model.routes and host.whole()


def test_a_remote_guest_that_ends_while_a_link_is_down_leaves_no_route(host: Host) -> None:
    """A bridge of somebody's containers goes up and down: what is believed of our routes stays true."""
    other = Link(9, "veth12", 0, bytes(6), False)
    host.settler.link_seen(other)
    host.settler.link_gone(9)
    host.remote(None)
    host.settle()
    assert {r.prefix for r in host.model.routes} == {OWN, parse_prefix("fd00::1"), GATEWAY4_ROUTE.prefix}


def test_a_tap_that_is_gone_leaves_nothing(host: Host) -> None:
    del host.model.links[TAP]
    host.model.routes -= {r for r in host.model.routes if r.oif == TAP}
    host.model.neighbours.clear()
    host.model.gateways.clear()
    dirty = host.settler.link_gone(TAP)
    assert not host.settler.sysctls_changed(TAP)
    host.scene.take(Run(0, replace(host.local, carrier=None, phase=Phase.RESERVED)))
    host.settle(dirty)
    assert host.settler.failures() == [] and not host.model.tables.grants and host.whole()
    assert TAP not in host.settler.actual.taps


def test_an_unknown_link_with_a_group_of_ours_is_closed(host: Host) -> None:
    host.model.links[55] = Link(55, "vnet55", BASE + 1, bytes(6), True)
    host.settle(host.settler.link_seen(host.model.links[55]))
    assert host.model.links[55].group == 0 and host.whole()


def test_a_foreign_set_of_a_name_of_ours_stops_what_names_it_until_it_goes(host: Host) -> None:
    name = next(n for n in host.model.tables.sets if n.startswith("addr4"))
    bigger = name.replace("-256", "-1024")
    host.model.tables.sets[bigger] = SetSpec(SetKind.ADDR6, 5)
    host.model.tables.members[bigger] = set()
    before = dict(host.model.tables.chains)
    grown = AddressSet({bytes((10, 65, 1 + n // 200, n % 200)) for n in range(200)})
    host.scene.take(Commit(((ObjectKey(Kind.SET, "all()"), grown),)))
    host.settle()
    told = {f.object for f in host.settler.failures()}
    assert {f"set {bigger}", "chain pi-web"} <= told
    assert host.model.tables.chains == before, "the last good policy stays"
    assert host.model.links[TAP].group == BASE + 1
    del host.model.tables.sets[bigger], host.model.tables.members[bigger]
    for now in range(3):
        host.settler.retry(now)
    assert host.whole()
    assert host.model.tables.members[bigger] == grown.addresses


def test_an_address_that_cannot_be_taken_away_is_not_forgotten(host: Host) -> None:
    other = replace(host.local.endpoint, addresses=(parse_address("10.65.0.7"),))
    host.model.refuses = lambda what, _: what == "expel"
    host.scene.take(Run(0, replace(host.local, endpoint=other, accepted=other)))
    host.settle()
    assert host.settler.failures() and host.model.tables.grants
    host.model.refuses = lambda *_: False
    for now in range(3):
        host.settler.retry(now)
    assert host.whole() and {source for _, _, source in host.model.tables.grants} == {parse_address("10.65.0.7")}


def test_a_new_policy_that_is_refused_leaves_the_guest_its_last_good_one(host: Host) -> None:
    was = host.model.tables.classes[BASE + 1]
    host.model.refuses = lambda what, item: what == "put chain" and item == "pi-new"
    more = Policy("new", "all()", (Direction.INGRESS,), 1, ingress=(Rule(Action.DENY),))
    host.scene.take(Commit(((ObjectKey(Kind.POLICY, "new"), more),)))
    host.settle()
    assert host.model.links[TAP].group == BASE + 1 and host.model.tables.classes[BASE + 1] == was
    assert "chain pi-new" in {f.object for f in host.settler.failures()}
    host.model.refuses = lambda *_: False
    for now in range(3):
        host.settler.retry(now)
    assert host.whole() and host.model.tables.classes[host.model.links[TAP].group] != was
    assert host.model.tables.classes.keys() == {BASE + 1}


def test_a_guard_that_cannot_be_read_is_tried_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError(4, "nf_tables kept changing")

    with monkeypatch.context() as patch:
        patch.setattr(host.kernel, "read", broken)
        assert host.settler.resync()
        host.scene.take(Commit(((ObjectKey(Kind.ROUTE, FAR), None),)))
        host.settle()
        assert host.settler.failures(), "what else is settled does not make it good"
    host.settler.retry(9)
    assert host.whole()




def test_a_guest_is_not_opened_before_its_addresses_old_flows_are_ended(host: Host) -> None:
    other = TAP + 1
    host.model.links[other] = Link(other, "vnet101", 0, bytes(6), True)
    guest = Endpoint(key(1), "other", {}, (), (parse_address("10.65.0.2"),))
    host.model.refuses = lambda what, _item: what == "flows"
    host.scene.take(Run(1, Local(guest, "qemu", Phase.LIVE, Carrier("vnet101", other), guest)))
    host.settle()
    host.settler.retry(0)
    assert host.model.links[other].group == 0 and host.model.links[TAP].group == BASE + 1
    assert "flows" in host.settler.failures()[0].message
    host.model.refuses = lambda *_: False
    host.settler.retry(1)
    assert host.whole() and host.model.links[other].group == BASE + 1


def test_what_was_believed_wrongly_is_looked_up_before_it_is_refused_for_ever(host: Host) -> None:
    """Elements went, and no notification said so: to take them away is refused, until the kernel is read."""
    host.model.tables.grants.clear()
    host.scene.take(Run(0, None))
    host.settle()
    assert host.settler.failures()
    for now in range(2):
        host.settler.retry(now)
    assert host.whole()


def test_a_tap_whose_sysctls_are_refused_stays_closed_also_when_the_kernel_is_read_again(host: Host) -> None:
    other = TAP + 1
    host.model.links[other] = Link(other, "vnet101", 0, bytes(6), True)
    guest = Endpoint(key(1), "other", {}, (), (parse_address("10.65.0.2"),))
    host.model.refuses = lambda what, item: what == "sysctl" and item == "vnet101"
    host.scene.take(Run(1, Local(guest, "qemu", Phase.LIVE, Carrier("vnet101", other), guest)))
    host.settle()
    for now in range(4):
        host.settler.retry(now)
        host.settler.resync()
        assert host.model.links[other].group == 0 and host.settler.failures()
    host.model.refuses = lambda *_: False
    host.settler.retry(5)
    assert host.whole() and host.model.links[other].group == BASE + 1
