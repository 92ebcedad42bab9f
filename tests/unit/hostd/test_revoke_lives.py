# Flows that are no longer allowed end with what host endpoints close, when something goes wrong meanwhile, and after
# any life.
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.desired import Admitted, ClassChains, Desired, Dirty, Member
from hostd.compiler.forwarding import Link
from hostd.compiler.ruleset import HOST_FORWARD_IN, HOST_FORWARD_OUT
from hostd.revocation.judge import View, Ways, judge, within
from hostd.revocation.revoke import EGRESS, INGRESS, Flow, OwnSocket
from slash32.net import Address, Prefix, host_prefix, parse_address
from slash32.pack import Kind, ObjectKey, Value
from slash32.policy import Direction, HostEndpoint, Peer, Policy, PortRange, Profile, Rule
from slash32.verdict import Packet
from tests.fake_kernel import FakeKernel, Model
from tests.scenes import ADDRESSES4, ADDRESSES6, FULL, HERE, PREFIXES, TAPS, Commit, Scene, Settle, Step, lives
from tests.unit.hostd.revoke_rig import (
    ALL,
    ALLOW,
    BACK,
    BASE,
    BOTH,
    DB,
    DENY,
    FAR,
    STRANGER,
    TO_DB,
    WEB,
    Host,
    flow,
    policy,
)

# -- host endpoints ---------------------------------------------------------------------------------------------------

SELF, ELSEWHERE = parse_address("192.0.2.254"), parse_address("192.0.2.9")
IN, OUT, THROUGH = flow(FAR, SELF, 8080), flow(SELF, FAR, 8080), flow(FAR, ELSEWHERE, 8080)
FROM_GUEST, TO_GUEST = flow(WEB, SELF, 8080), flow(SELF, WEB, 8080)
SSH, DISPATCHER, LEASE = flow(FAR, SELF, 22), flow(SELF, FAR, 7432), flow(DB, SELF, 67, 68, 17)
OF_HOST = {IN, OUT, THROUGH, FROM_GUEST, TO_GUEST, SSH, DISPATCHER, LEASE, *ALL}


def endpoint(interface: str) -> dict[ObjectKey, Value | None]:
    return {ObjectKey(Kind.HOSTENDPOINT, "up"): HostEndpoint("up", HERE, interface, {"host": "yes"}, (), ("open",))}


def of_host(*rules: Rule, forward: bool = False, way: Direction | None = None) -> dict[ObjectKey, Value | None]:
    ways = (way,) if way else BOTH
    some = {way: rules if way in ways else () for way in BOTH}
    made = Policy("h", "has(host)", ways, 1.0, some[BOTH[0]], some[BOTH[1]], apply_on_forward=forward)
    return {ObjectKey(Kind.POLICY, "h"): made}


WEB_OPEN = {ObjectKey(Kind.POLICY, "web"): policy("web", 'role == "web"', (), (ALLOW,))}
WEB_CLOSED = {ObjectKey(Kind.POLICY, "web"): policy("web", 'role == "web"', (), (TO_DB,))}
LESS_OPEN = {ObjectKey(Kind.PROFILE, "open"): Profile("open", (ALLOW,), ())}
NOT_8080 = replace(DENY, protocol=6, destination=Peer(ports=(PortRange(8080, 8080),)))
CLOSES = {
    "the first one": ("", endpoint("up0") | of_host(DENY, way=BOTH[0]), {IN}),
    "coming in": ("up0", of_host(DENY, way=BOTH[0]), {IN}),
    "going out": ("up0", of_host(DENY, way=BOTH[1]), {OUT}),
    "by another interface": ("up1", of_host(DENY), set()),
    "through it": ("up0", of_host(NOT_8080, forward=True), {IN, OUT, THROUGH}),
    "by all interfaces": ("*", of_host(NOT_8080), {IN, OUT, FROM_GUEST, TO_GUEST}),
    "its profile": ("*", LESS_OPEN, {OUT, TO_GUEST, BACK, STRANGER}),
    "none for guests any more": ("*", endpoint("up0"), {FROM_GUEST}),
    "a guest's policy": ("*", WEB_CLOSED, {FROM_GUEST}),
    "a guest that may not speak to it anyhow": ("up0", WEB_CLOSED, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSES)
def test_what_host_endpoints_close_ends_but_for_what_they_never_close(host: Host, case: str) -> None:
    before, change, ended = CLOSES[case]
    host.model.own, host.settler.dispatcher_port = {SELF}, 7432
    host.take(dict(WEB_OPEN))
    if before:
        host.take(endpoint(before))
    host.track(*OF_HOST)
    host.take(change)
    assert host.model.tracked == OF_HOST - ended
    own = {IN: OwnSocket(SELF, 8080, FAR, 40000), OUT: OwnSocket(SELF, 40000, FAR, 8080)}
    assert set(host.model.sockets) == {own[each] for each in own.keys() & ended}
    host.model.walks = 0
    host.start()
    assert host.model.walks == 0 and host.model.tracked == OF_HOST - ended


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_what_cannot_be_ended_is_said_and_owed(host: Host) -> None:
    host.track(*ALL)
    host.model.refuses = lambda what, _item: what == "walk"
    host.scene.take(Commit(((ObjectKey(Kind.POLICY, "web"), policy("web", 'role == "web"', (), (DENY,))),)))
    host.settle()
    assert [f.object for f in host.settler.failures()] == ["flows"] and host.owed == [True]
    host.settler.retry(0)
    assert [f.object for f in host.settler.failures()] == ["flows"] and host.model.tracked == set(ALL)
    host.model.refuses = lambda *_: False
    for now in range(1, 4):
        host.settler.retry(now)
    assert host.settler.failures() == [] and host.owed[-1] is False
    assert host.model.tracked == {BACK, STRANGER}


def test_a_rule_that_is_refused_takes_nothing_until_it_stands(host: Host) -> None:
    host.track(*ALL)
    host.model.refuses = lambda what, item: (what, item) == ("put chain", "po-web")
    host.scene.take(Commit(((ObjectKey(Kind.POLICY, "web"), policy("web", 'role == "web"', (), (DENY,))),)))
    host.settle()
    assert host.settler.failures() and host.model.tracked == set(ALL)
    host.model.refuses = lambda *_: False
    host.settler.retry(0)
    assert host.model.tracked == {BACK, STRANGER}


def test_killed_before_they_are_ended(host: Host) -> None:
    """The next start judges all there is, by what is in force then."""
    host.put(policy("db", 'role == "db"', (ALLOW,), (ALLOW,), keep=True))
    host.track(*ALL)
    host.model.refuses = lambda what, _item: what == "walk"
    host.scene.take(Commit(((ObjectKey(Kind.POLICY, "web"), policy("web", 'role == "web"', (), (DENY,))),)))
    host.settle()
    host.model.refuses = lambda *_: False
    settler = Settler(FakeKernel(host.model), host.scene.calc, Limits(BASE), ("vnet",), owes=host.owed.append)
    settler.force.owe_all(host.scene.calc.desired.taps)
    writes = host.model.writes
    assert settler.resync() == []
    assert host.model.writes == writes and host.model.tracked == {BACK, STRANGER} and host.owed[-1] is False


def test_killed_before_anything_is_changed(host: Host) -> None:
    """The kernel has the old rules, which nobody knows any more."""
    host.track(*ALL)
    host.scene.take(Commit(((ObjectKey(Kind.POLICY, "web"), policy("web", 'role == "web"', (), (DENY,))),)))
    host.scene.rest()
    host.start()
    assert host.model.tracked == {BACK, STRANGER}


@pytest.mark.parametrize("what", ["all", "a rule", "members"])
def test_what_leaked_while_somebody_had_taken_rules_away_ends(host: Host, what: str) -> None:
    leaked = flow(WEB, FAR)
    host.track(*ALL, leaked)
    if what == "all":
        host.model.tables = type(host.model.tables)()
    elif what == "a rule":
        host.model.tables.chains["po-web"] = ()
    else:
        name = next(n for n in host.model.tables.sets if n.startswith("addr4"))
        host.model.tables.members[name].add(FAR)
    assert host.settler.resync() == []
    assert host.model.tracked == set(ALL)
    assert host.settler.resync() == [] and host.model.walks == 1


# -- any life ---------------------------------------------------------------------------------------------------------


def test_after_any_life_the_flows_are_those_that_are_allowed() -> None:
    """Flows are begun at every step, where they are allowed: after the next, those go on that still are."""

    @settings(max_examples=400 if FULL else 80, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(lives())
    def lead(steps: list[Step]) -> None:
        _lead(steps)

    lead()


def _lead(steps: list[Step]) -> None:
    scene, chance = Scene(), random.Random(len(steps))
    model = Model(links={index: Link(index, f"vnet{index}", 0, bytes(6), True) for index in TAPS})
    settler = Settler(FakeKernel(model), scene.calc, Limits(BASE), ("vnet",))
    settler.resync()
    for step in [*steps, Settle()]:
        if not isinstance(step, Settle):
            scene.take(step)
            continue
        scene.rest()
        dirty, scene.dirty = scene.dirty, Dirty()
        owned = {i: _owned(t) for i, t in settler.actual.taps.items()}
        settler.settle(dirty)
        assert settler.failures() == []
        fresh = [
            m for i, t in settler.actual.taps.items() for m in (t.addresses | t.prefixes) - owned.get(i, frozenset())
        ]
        _look(model, scene.fresh().desired, within(m if isinstance(m, Prefix) else host_prefix(m) for m in fresh))
        allowed = {f for f in _some(chance) if _allowed(scene.fresh().desired, f.packet)}
        model.tracked |= allowed
        model.begun = set(model.tracked)


def _owned(tap: Admitted) -> set[Member]:
    return {*tap.addresses, *tap.prefixes}


def _look(model: Model, desired: Desired, anew: Callable[[Address], bool]) -> None:
    for alive in model.tracked:
        assert _allowed(desired, alive.packet), f"goes on: {alive.packet}"
    for ended in model.begun - model.tracked:
        packet = ended.packet
        assert not _allowed(desired, packet) or anew(packet.source) or anew(packet.destination), f"ended: {packet}"


def _allowed(desired: Desired, packet: Packet) -> bool:
    view = View(desired.chains, lambda name, address: any(
        m.contains(address) if isinstance(m, Prefix) else m == address for m in desired.members(name)
    ))  # fmt: skip
    route = desired.routes.get(host_prefix(packet.destination))
    receivers = _behind(desired, packet.destination) if route is None else {route.oif}
    senders, receivers = _behind(desired, packet.source), receivers & desired.taps.keys()
    ends = [(i, EGRESS) for i in senders] + [(i, INGRESS) for i in receivers]
    ways = Ways("" if senders else "up0", "" if receivers else "up0")  # whoever is no guest here is reached by that one
    forwarded = [chain for chain, way in ((HOST_FORWARD_IN, ways.incoming), (HOST_FORWARD_OUT, ways.outgoing)) if way]
    return all(judge(view, _chains(desired, i)[side], packet).accept for i, side in ends) and all(
        judge(view, chain, packet, ways).accept is not False for chain in forwarded
    )


def _chains(desired: Desired, ifindex: int) -> ClassChains:
    return desired.taps[ifindex].chains


def _behind(desired: Desired, address: Address) -> set[int]:
    """Those with the most specific claim to it."""

    def claim(member: Member) -> int:
        prefix = member if isinstance(member, Prefix) else host_prefix(member)
        return prefix.length if prefix.contains(address) else -1

    length = {
        i: max((claim(m) for m in (*tap.addresses, *tap.prefixes)), default=-1) for i, tap in desired.taps.items()
    }
    most = max(length.values(), default=-1)
    return {i for i, have in length.items() if have == most >= 0}


def _some(chance: random.Random) -> list[Flow]:
    places = [ADDRESSES4[:5] + [p.network[:3] + b"\x05" for p in PREFIXES if p.version == 4] + [FAR], ADDRESSES6[:5]]
    pairs = [chance.sample(chance.choice(places), 2) for _ in range(20)]
    return [flow(a, b, chance.choice((22, 80, 443)), 1024, chance.choice((6, 17))) for a, b in pairs]
