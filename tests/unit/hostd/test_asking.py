# What is asked of the dispatcher, and when again: it follows from what is wanted and granted, whatever was lost.
from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.guests.claims import GRACE, RETRY, Claims, reportable
from hostd.state import Carrier, Local, Locals, Phase
from slash32.model import Endpoint, SharedAddress
from slash32.net import parse_address, parse_prefix
from tests.scenes import key


def endpoint(number: int = 1, role: str = "web", **more: object) -> Endpoint:
    address = (parse_address(f"10.65.0.{number}"),)
    return replace(Endpoint(key(number), f"guest{number}", {"role": role}, (), address), **more)  # type: ignore[arg-type]


def local(phase: Phase = Phase.RESERVED, accepted: bool = False, **more: object) -> Local:
    mine = endpoint(**more)  # type: ignore[arg-type]
    return Local(mine, "qemu", phase, Carrier("vnet0", 7), mine if accepted else None)


def claims_of(*of: Local) -> Claims:
    return Claims(Locals({x.endpoint.key: x for x in of}))


@pytest.mark.parametrize(
    ("phase", "accepted", "due", "reported"),
    [
        (Phase.RESERVED, False, True, True),
        (Phase.RESERVED, True, False, True),
        (Phase.INCOMING, False, False, False),  # its source's still
        (Phase.ARRIVED, False, True, True),
        (Phase.LIVE, False, True, True),
        (Phase.LIVE, True, False, True),
        (Phase.KEPT, True, False, False),  # it ended
    ],
)
def test_what_is_asked_for(phase: Phase, accepted: bool, due: bool, reported: bool) -> None:
    one = local(phase, accepted)
    assert claims_of(one).due(0) == ([one.endpoint] if due else [])
    assert reportable([one]) == ([one.endpoint] if reported else [])


def test_what_is_asked_is_not_asked_again_until_it_is_answered_or_lost() -> None:
    claims = claims_of(local())
    claims.asked(1, claims.due(0), 0)
    assert claims.due(100) == []
    claims.lost()
    assert claims.due(100) == [endpoint()]


def test_another_tag_is_asked_for_at_once() -> None:
    claims = claims_of(local())
    claims.asked(1, claims.due(0), 0)
    claims.locals.put(local(role="db"))
    assert claims.due(0) == [endpoint(role="db")]


def test_what_was_refused_is_asked_again_later_and_another_tag_at_once() -> None:
    claims = claims_of(local())
    claims.asked(1, claims.due(0), 0)
    assert claims.answered(1, {key(1): "no"}, 1.0) == [(endpoint(), "no")]
    assert claims.due(1.0 + RETRY - 0.1) == []
    assert claims.due(1.0 + RETRY) == [endpoint()]
    claims.locals.put(local(role="db"))
    assert claims.due(1.0) == [endpoint(role="db")]


def test_an_answer_that_nobody_waits_for_says_nothing() -> None:
    claims = claims_of(local())
    claims.asked(1, claims.due(0), 0)
    claims.lost()
    assert claims.answered(1, {}, 0) == [] and claims.answered(99, {}, 0) == []


def test_one_answer_to_many() -> None:
    claims = claims_of(local(), local(number=2))
    claims.asked(1, claims.due(0), 0)
    assert claims.answered(1, {key(2): "no"}, 0) == [(endpoint(1), ""), (endpoint(2), "no")]


def test_who_is_forgotten_is_not_answered() -> None:
    claims = claims_of(local())
    claims.asked(1, claims.due(0), 0)
    claims.forget(key(1))
    assert claims.answered(1, {key(1): "no"}, 0) == []
    assert claims.due(0) == [endpoint()], "a new one of that key is asked for at once"


def test_an_answer_is_overdue_after_its_grace() -> None:
    claims = claims_of(local())
    assert not claims.overdue(1e9)
    claims.asked(1, claims.due(0), 0)
    assert not claims.overdue(GRACE) and claims.overdue(GRACE + 0.1)
    claims.answered(1, {}, 0)
    assert not claims.overdue(1e9)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["ask", "grant", "refuse", "lost", "web", "db", "wait"]), max_size=20))
def test_whatever_is_lost_in_the_end_it_is_granted(news: list[str]) -> None:
    """And what was asked last is never asked again before it is answered or lost."""
    claims, now, seq, open_ = claims_of(local()), 0.0, 0, {}
    for what in [*news, "lost", "wait", "ask", "grant"]:
        one = claims.locals.get(key(1))
        assert one is not None
        if what == "ask":
            for wanted in claims.due(now):
                assert wanted != next(reversed(open_.values()), None)
                seq += 1
                open_[seq] = wanted
                claims.asked(seq, [wanted], now)
        elif what in ("grant", "refuse") and open_:
            first = min(open_)
            del open_[first]
            for granted, why in claims.answered(first, {key(1): "no"} if what == "refuse" else {}, now):
                claims.locals.put(replace(one, accepted=one.accepted if why else granted))
        elif what == "lost":
            claims.lost()
            open_.clear()
        elif what == "wait":
            now += RETRY
        elif what in ("web", "db"):
            claims.locals.put(replace(one, endpoint=endpoint(role=what)))
    last = claims.locals.get(key(1))
    assert last is not None and last.accepted == last.endpoint


# -- what two guests of one host cannot both have ------------------------------------------------------------------

VIP, BEHIND = parse_address("10.9.0.1"), parse_prefix("10.66.0.0/26")
OVERLAPS = [
    ({}, {}, None),
    ({}, {"addresses": (parse_address("10.65.0.1"),)}, "address 10.65.0.1"),
    ({"shared": (SharedAddress(VIP, "a"),)}, {"shared": (SharedAddress(VIP, "a"),)}, None),
    ({"shared": (SharedAddress(VIP, "a"),)}, {"shared": (SharedAddress(VIP, "b"),)}, "address 10.9.0.1"),
    ({"shared": (SharedAddress(VIP, "a"),)}, {"addresses": (VIP,)}, "address 10.9.0.1"),
    ({"prefixes": (BEHIND,)}, {"prefixes": (BEHIND,)}, "prefix 10.66.0.0/26"),
    ({"prefixes": (BEHIND,)}, {"prefixes": (parse_prefix("10.66.0.64/26"),)}, None),
]


@pytest.mark.parametrize(("mine", "theirs", "taken"), OVERLAPS)
def test_conflicts_on_one_host(mine: dict[str, object], theirs: dict[str, object], taken: str | None) -> None:
    for one, two in ((mine, theirs), (theirs, mine)):
        found = Locals({key(1): local(number=1, **one)}).conflict(endpoint(2, **two))  # type: ignore[arg-type]
        if "addresses" in one and taken == "address 10.65.0.1":
            continue  # turned round it is another case
        assert found == (f"{taken} is in use by 'guest1' on this host: give each guest its own" if taken else None)


def test_what_a_guest_left_behind_is_in_nobodys_way() -> None:
    kept = local(Phase.KEPT, True)
    assert Locals({key(1): kept}).conflict(endpoint(2, addresses=kept.endpoint.addresses)) is None


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(Phase), st.booleans(), st.sampled_from(["web", "db"]),
                          st.booleans()), max_size=12))  # fmt: skip
def test_what_is_unclaimed_is_known_without_a_look_through_all(steps: list[tuple[int, Phase, bool, str, bool]]) -> None:
    """However an endpoint came to be as it is."""
    first = local(Phase.LIVE, number=1)
    locals_ = Locals({first.endpoint.key: first})
    assert set(locals_.unclaimed) == {key(1)}
    for number, phase, granted, role, gone in steps:
        if gone:
            locals_.remove(key(number))
        else:
            one = local(phase, number=number, role=role)
            locals_.put(replace(one, accepted=endpoint(number) if granted else None))
        assert set(locals_.unclaimed) == {x.endpoint.key for x in locals_ if x.is_unclaimed}
