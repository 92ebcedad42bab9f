# Flows that a change takes the permission from end with it, and no others; nothing is walked where nothing was taken:
# on the model kernel.
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
from hostd.compiler.ruleset import HOST_FORWARD_IN, HOST_FORWARD_OUT, Guard
from hostd.revocation.judge import View, Ways, judge, within
from hostd.revocation.revoke import EGRESS, INGRESS, Flow, OwnSocket
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import Address, Prefix, host_prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey, Value
from slash32.policy import Action, Direction, HostEndpoint, Peer, Policy, PortRange, Profile, Rule
from slash32.verdict import Packet
from tests.fake_kernel import FakeKernel, Model
from tests.scenes import (
    ADDRESSES4,
    ADDRESSES6,
    FULL,
    HERE,
    PREFIXES,
    TAPS,
    Commit,
    Run,
    Scene,
    Settle,
    Step,
    key,
    lives,
)

BASE = Guard().group_base
WEB, DB, OTHER, FAR = map(parse_address, ("10.65.0.1", "10.65.0.2", "10.65.0.3", "10.99.0.1"))
WEB6, DB6 = map(parse_address, ("fd00:65::1", "fd00:65::2"))
BEHIND = parse_prefix("10.66.0.0/26")
ALLOW, DENY = Rule(Action.ALLOW), Rule(Action.DENY)
PORTS = Peer(ports=(PortRange(80, 80),))
TO_DB = Rule(Action.ALLOW, 6, destination=Peer(selector='role == "db"'))
BOTH = (Direction.INGRESS, Direction.EGRESS)


def policy(name: str, whom: str, ingress: tuple[Rule, ...], egress: tuple[Rule, ...], keep: bool = False) -> Policy:
    types = tuple(d for d, rules in zip(BOTH, (ingress, egress), strict=True) if rules)
    return Policy(name, whom, types, None, ingress, egress, keep_established=keep)


ANY_DB = policy("db", 'role == "db"', (ALLOW,), (ALLOW,))


def flow(source: Address, destination: Address, port: int = 80, begun: int = 40000, protocol: int = 6) -> Flow:
    packet = Packet(source, destination, protocol, begun, port)
    return Flow(repr(packet).encode(), packet)


class Host:
    """web (10.65.0.1) on vnet100, db (10.65.0.2) on vnet101, other (10.65.0.3) on vnet102. All may all, but web says
    nothing but TCP to db."""

    def __init__(self) -> None:
        self.scene = Scene()
        self.model = Model(links={100 + n: Link(100 + n, f"vnet{100 + n}", 0, bytes(6), True) for n in range(3)})
        self.owed: list[bool] = []
        self.settler = self.start()
        for number, (role, own) in enumerate((("web", (WEB, WEB6)), ("db", (DB, DB6)), ("other", (OTHER,)))):
            self.run(number, Endpoint(key(number), role, {"role": role}, ("open",), own))
        self.put(
            Profile("open", (ALLOW,), (ALLOW,)),
            policy("web", 'role == "web"', (), (TO_DB,)),
            policy("odd", 'role == "odd"', (DENY,), ()),
        )
        self.members('role == "db"', DB, DB6)
        self.model.walks = 0
        self.owed.clear()

    def start(self) -> Settler:
        self.kernel = FakeKernel(self.model)
        self.settler = Settler(self.kernel, self.scene.calc, Limits(BASE), ("vnet",), owes=self.owed.append)
        assert self.settler.resync() == []
        return self.settler

    def run(self, number: int, endpoint: Endpoint) -> None:
        tap = Carrier(f"vnet{100 + number}", 100 + number)
        self.scene.take(Run(number, Local(endpoint, "qemu", Phase.LIVE, tap, endpoint)))
        self.settle()

    def label(self, number: int, **labels: str) -> None:
        local = self.scene.locals.get(key(number))
        assert local is not None
        self.run(number, replace(local.endpoint, labels=labels))

    def put(self, *items: Policy | Profile) -> None:
        kinds = {Policy: Kind.POLICY, Profile: Kind.PROFILE}
        self.take({ObjectKey(kinds[type(item)], item.name): item for item in items})

    def gone(self, kind: Kind, name: str) -> None:
        self.take({ObjectKey(kind, name): None})

    def members(self, selector: str, *members: Address | Prefix) -> None:
        some = AddressSet({m for m in members if isinstance(m, bytes)}, {m for m in members if isinstance(m, Prefix)})
        self.take({ObjectKey(Kind.SET, selector): some})

    def take(self, values: dict[ObjectKey, Value | None]) -> None:
        self.scene.take(Commit(tuple(values.items())))
        self.settle()
        assert self.settler.failures() == []

    def settle(self) -> None:
        self.scene.rest()
        dirty, self.scene.dirty = self.scene.dirty, Dirty()
        self.settler.settle(dirty)

    def join(self, rules: tuple[Rule, ...] = (ALLOW,)) -> None:
        """The guest db, which a policy lets do all, comes under one more, which is asked first. Another one stays."""
        self.put(ANY_DB, policy("also", "has(more)", rules, rules))
        self.label(2, role="db")
        self.model.walks = 0
        self.owed.clear()
        self.label(1, role="db", more="yes")

    def track(self, *flows: Flow) -> None:
        self.model.tracked = set(flows)


@pytest.fixture
def host() -> Host:
    return Host()


SESSION, SIX, BACK, STRANGER = flow(WEB, DB), flow(WEB6, DB6), flow(DB, WEB, 90), flow(OTHER, DB)
ALL = (SESSION, SIX, BACK, STRANGER)
REVOKES: dict[str, tuple[Callable[[Host], object], tuple[Flow, ...]]] = {
    "a rule goes": (lambda h: h.put(policy("web", 'role == "web"', (), (DENY,))), (SESSION, SIX)),
    "a rule is narrowed": (
        lambda h: h.put(policy("web", 'role == "web"', (), (replace(TO_DB, ip_version=6),))), (SESSION,),
    ),
    "a member leaves": (lambda h: h.members('role == "db"', DB6), (SESSION,)),
    "a member of the other family leaves": (lambda h: h.members('role == "db"', DB), (SIX,)),
    "the set is gone": (lambda h: h.gone(Kind.SET, 'role == "db"'), (SESSION, SIX)),
    "another policy goes before": (
        lambda h: h.put(replace(policy("no", 'role == "web"', (), (DENY,)), order=1)), (SESSION, SIX),
    ),
    "a policy for the receiver": (lambda h: h.put(policy("db", 'role == "db"', (DENY,), ())), (SESSION, SIX, STRANGER)),
    "a policy by ports": (
        lambda h: h.put(policy("db", 'role == "db"', (replace(ALLOW, protocol=6, destination=PORTS),), (ALLOW,)),
                        policy("in", 'role == "web"', (replace(ALLOW, protocol=6, destination=PORTS),), ())),
        (BACK,),
    ),
    "the profile changes": (lambda h: h.put(Profile("open", (ALLOW,), ())), (BACK, STRANGER)),
    "the profile goes": (lambda h: h.gone(Kind.PROFILE, "open"), ALL),
    "its label changes": (
        lambda h: h.label(1, role="odd"), (SESSION, SIX, STRANGER),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REVOKES)
def test_what_is_not_allowed_any_more_ends_and_nothing_else(host: Host, case: str) -> None:
    change, ended = REVOKES[case]
    host.track(*ALL)
    change(host)
    assert host.model.tracked == set(ALL) - set(ended)
    assert host.owed == [True, False] and host.model.walks == 1
    assert host.settler.counters.ended == len(ended)


def test_a_policy_that_goes_and_leaves_the_profile(host: Host) -> None:
    """To a policy that allows nothing else the profile is more; to one that allows more it is less."""
    host.track(*ALL)
    host.gone(Kind.POLICY, "web")
    assert host.model.tracked == set(ALL)
    host.put(Profile("open", (ALLOW,), ()), policy("web", 'role == "web"', (), (ALLOW,)))
    host.track(*ALL)
    host.gone(Kind.POLICY, "web")
    assert host.model.tracked == {BACK, STRANGER}, "what was denied before goes on, if somebody let it"


GRANTS: dict[str, Callable[[Host], object]] = {
    "a member joins": lambda h: h.members('role == "db"', DB, DB6, OTHER),
    "of the other family": lambda h: h.members('role == "db"', DB, DB6, parse_address("fd00:65::3")),
    "a guest starts": lambda h: h.run(3, Endpoint(key(3), "new", {"role": "web"}, (), (parse_address("10.65.0.4"),))),
    "a policy that nobody here has": lambda h: h.put(policy("x", "has(x)", (DENY,), (DENY,))),
    "a profile that nobody here has": lambda h: h.put(Profile("x", (DENY,))),
    "a guest joins what has policies that only allow": lambda h: h.join(),
    "a route": lambda h: h.take({ObjectKey(Kind.ROUTE, host_prefix(FAR)): ("h2",)}),
    "a set that nobody asks": lambda h: h.members("has(x)", DB),
    "the same again": lambda h: h.settler.resync(),
    "a start": lambda h: h.start(),
}


@pytest.mark.parametrize("case", GRANTS)
def test_what_takes_nothing_is_walked_for_by_nobody(host: Host, case: str) -> None:
    host.model.links[103] = Link(103, "vnet103", 0, bytes(6), True)
    host.track(*ALL)
    GRANTS[case](host)
    assert host.model.tracked == set(ALL)
    assert host.model.walks == 0 and host.owed == []


@pytest.mark.parametrize("deny", [(DENY,), (replace(ALLOW, protocol=17), DENY)])
def test_a_guest_that_joins_what_does_not_only_allow_is_judged(host: Host, deny: tuple[Rule, ...]) -> None:
    """The control of that case."""
    host.join()
    host.model.walks = 0
    host.label(1, role="db")
    assert host.model.walks == 1, "it leaves"
    host.put(policy("also", "has(more)", deny, deny))
    host.track(*ALL)
    host.label(1, role="db", more="yes")
    assert host.model.walks == 2 and host.model.tracked == set()


def test_a_guest_joins_what_the_kernel_refuses_to_make_give(host: Host) -> None:
    """Desired is a policy that only allows; in the kernel stands one that denies."""
    host.put(policy("also", "has(more)", (DENY,), (DENY,)), ANY_DB)
    host.label(2, role="db", more="yes")
    host.run(0, Endpoint(key(0), "web", {"role": "db"}, (), (WEB, WEB6)))  # so that the class of the next one stays
    host.track(*ALL)
    host.model.refuses = lambda what, item: (what, item) in (("put chain", "pi-also"), ("put chain", "po-also"))
    also = policy("also", "has(more)", (ALLOW,), (ALLOW,))
    host.scene.take(Commit(((ObjectKey(Kind.POLICY, "also"), also),)))
    host.label(1, role="db", more="yes")
    force, actual = host.settler.force, host.settler.actual
    closed = any("-also" in str(force.chains[name]) for name in actual.classes[actual.taps[101].group])
    assert host.settler.failures() and closed and host.model.tracked == set()


def test_prefixes_that_join_take_nothing_and_those_that_leave_do(host: Host) -> None:
    host.members('role == "db"', DB, DB6, BEHIND)
    host.model.walks = 0
    behind, beyond = flow(WEB, parse_address("10.66.0.5")), flow(WEB, parse_address("10.66.1.5"))
    host.track(*ALL, behind, beyond)
    host.members('role == "db"', DB, DB6, BEHIND, parse_prefix("10.66.1.0/26"))
    assert host.model.walks == 0
    host.start()
    host.members('role == "db"', DB, DB6, parse_prefix("10.66.1.0/26"), parse_prefix("fd66::/64"))
    assert host.model.tracked == {*ALL, beyond}


@pytest.mark.parametrize("rule", [
    replace(TO_DB, destination=Peer(not_selector='role == "app"')),
    None,
])  # fmt: skip
def test_who_joins_what_is_denied_loses(host: Host, rule: Rule | None) -> None:
    denies = replace(TO_DB, action=Action.DENY, destination=Peer(selector='role == "app"'))
    host.members('role == "app"', FAR)
    host.put(policy("web", 'role == "web"', (), (rule,) if rule else (denies, ALLOW)))
    host.track(*ALL)
    host.members('role == "app"', FAR, DB)
    assert host.model.tracked == set(ALL) - {SESSION}
    host.members('role == "app"', FAR)
    assert host.model.tracked == set(ALL) - {SESSION}


@pytest.mark.parametrize("allows", ["policy", "profile"])
def test_who_joins_or_leaves_what_passes_on_loses(host: Host, allows: str) -> None:
    """It is asked elsewhere then: in its profile, or in the rest of its tier."""
    passing = replace(TO_DB, action=Action.PASS, destination=Peer(selector='role == "app"'))
    last, profile = (TO_DB, DENY) if allows == "policy" else (DENY, TO_DB)
    with_db = (FAR,) if allows == "policy" else (FAR, DB)
    host.members('role == "app"', *with_db)
    host.put(policy("web", 'role == "web"', (), (passing, last)), Profile("open", (ALLOW,), (profile, ALLOW)))
    host.track(SESSION, STRANGER)
    host.members('role == "app"', *{FAR, DB}.symmetric_difference(with_db), FAR)
    assert host.model.tracked == {STRANGER}


def test_a_set_that_outgrows_its_size_takes_nothing(host: Host) -> None:
    host.track(*ALL)
    host.members('role == "db"', DB, DB6, *(bytes((10, 70, n, n)) for n in range(200)))
    assert host.model.tracked == set(ALL)


# -- keepEstablished --------------------------------------------------------------------------------------------------


def test_a_policy_keeps_what_it_allowed(host: Host) -> None:
    host.put(policy("web", 'role == "web"', (), (TO_DB,), keep=True))
    host.track(*ALL)
    host.members('role == "db"')
    host.put(policy("web", 'role == "web"', (), (DENY,)))
    assert host.model.tracked == set(ALL), "also when it does no longer"
    host.gone(Kind.POLICY, "web")
    host.put(Profile("open", (ALLOW,), ()))
    assert host.model.tracked == set(), "the profile allowed them, and keeps nothing"


def test_a_policy_that_goes_keeps_what_it_allowed(host: Host) -> None:
    host.put(Profile("open", (ALLOW,), ()), policy("web", 'role == "web"', (), (TO_DB,), keep=True))
    host.track(SESSION, SIX)
    host.gone(Kind.POLICY, "web")
    assert host.model.tracked == {SESSION, SIX}


def test_a_policy_in_parts_keeps_from_now_on_what_it_allowed(host: Host) -> None:
    """What a rule that passes divides is other chains with each change."""
    passing = replace(DENY, action=Action.PASS, protocol=7)
    for keep, left in ((True, set(ALL)), (False, {BACK})):
        host.put(policy("web", 'role == "web"', (), (passing, TO_DB)))
        host.track(*ALL)
        host.put(policy("web", 'role == "web"', (), (passing, DENY), keep=keep))
        assert host.model.tracked == left | {STRANGER}


def test_a_policy_that_keeps_from_now_on_keeps_already(host: Host) -> None:
    host.track(*ALL)
    host.put(policy("web", 'role == "web"', (), (replace(TO_DB, ip_version=6),), keep=True))
    assert host.model.tracked == set(ALL)
    host.put(policy("web", 'role == "web"', (), (DENY,), keep=True))
    assert host.model.tracked == set(ALL)


def test_another_end_that_keeps_nothing_ends_it(host: Host) -> None:
    host.put(policy("web", 'role == "web"', (), (TO_DB,), keep=True))
    host.track(*ALL)
    host.put(policy("db", 'role == "db"', (DENY,), ()))
    assert host.model.tracked == {BACK}


def test_what_is_kept_is_kept_also_where_one_cannot_know_what_was_before(host: Host) -> None:
    """A set that is sent whole: what it held is not known."""
    host.put(policy("web", 'role == "web"', (), (TO_DB,), keep=True))
    host.track(*ALL)
    host.members('role == "db"', DB6)
    host.put(policy("web", 'role == "web"', (), (TO_DB,)))
    assert SESSION in host.model.tracked
    host.scene.take(Commit(((ObjectKey(Kind.SET, 'role == "db"'), AddressSet({WEB})),)))
    host.scene.absorb(True)
    host.settle()
    assert host.model.tracked == set(ALL) - {SIX}


def test_also_one_that_allows_nothing_any_more(host: Host) -> None:
    host.track(*ALL)
    host.put(policy("web", 'role == "web"', (), (DENY,), keep=True))
    assert host.model.tracked == set(ALL)


def test_also_one_that_is_of_the_other_direction_now(host: Host) -> None:
    host.track(*ALL)
    other = policy("other", 'role == "web"', (), (DENY,))
    host.put(other, policy("web", 'role == "web"', (ALLOW,), (), keep=True))
    assert host.model.tracked == set(ALL)


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
