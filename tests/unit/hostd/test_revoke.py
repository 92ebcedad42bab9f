# Flows that a change of policies takes the permission from end with it, and no others; nothing is walked where nothing
# was taken. What keepEstablished keeps.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hostd.compiler.forwarding import Link
from hostd.revocation.revoke import Flow
from slash32.model import Endpoint
from slash32.net import host_prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.policy import Action, Peer, Profile, Rule
from tests.scenes import Commit, key
from tests.unit.hostd.revoke_rig import (
    ALL,
    ALLOW,
    ANY_DB,
    BACK,
    BEHIND,
    DB,
    DB6,
    DENY,
    FAR,
    OTHER,
    PORTS,
    SESSION,
    SIX,
    STRANGER,
    TO_DB,
    WEB,
    WEB6,
    Host,
    flow,
    policy,
)

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
