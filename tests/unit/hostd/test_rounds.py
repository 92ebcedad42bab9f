# Whom a host knocks at, and when: all in turn at once, then pauses that grow; never more often than is good for all.
from __future__ import annotations

import random
from itertools import pairwise

import pytest

from hostd.session.rounds import LONGEST, PAUSE, STEADY, Rounds


def attempts(count: int, seconds: float, lasted: float = 0.0) -> list[tuple[float, int]]:
    """When and whom, where each session ends after `lasted` seconds."""
    rounds, now, found = Rounds(count, random.Random(1).random), 100.0, []
    while now < 100.0 + seconds:
        found.append((now, rounds.present))
        now += lasted
        rounds.failed(now, lasted)
        now = max(now, rounds.due)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 15])
def test_all_in_turn_then_a_pause_that_grows(count: int) -> None:
    found = attempts(count, 60.0)
    rounds = [found[i : i + count] for i in range(0, len(found) - count, count)]
    for one in rounds:
        assert {whom for _, whom in one} == set(range(count)) and len({when for when, _ in one}) == 1
    pauses = [after[0][0] - before[0][0] for before, after in pairwise(rounds)]
    assert PAUSE / 2 <= pauses[0] <= PAUSE and all(pause <= LONGEST for pause in pauses)
    assert min(pauses[-3:]) >= LONGEST / 2 and len(set(pauses)) > 5, "with jitter"
    assert len(rounds) < 30


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("lasted", [0.0, 0.001, 0.1, STEADY - 0.01, STEADY, 5.0])
def test_sessions_that_end_at_once_are_no_reason_to_hurry(count: int, lasted: float) -> None:
    """A dispatcher that takes us and drops us: so many attempts in a minute, whatever it does."""
    assert len(attempts(count, 60.0, lasted)) <= (60 * (count if lasted < STEADY else 1) + 2 * count) / max(lasted, 1.0)


def test_a_session_that_lasted_makes_all_as_new() -> None:
    rounds = Rounds(3, random.Random(2).random)
    first = rounds.present
    for _ in range(30):
        rounds.failed(7.0)
    assert rounds.due > 7.0 + LONGEST / 2 - 0.01
    rounds.failed(20.0, lasted=STEADY)
    assert rounds.due == 20.0 and rounds.present != first, "the next, at once"
    rounds.failed(20.0)
    assert rounds.due == 20.0
    rounds.failed(20.0)
    assert 20.0 < rounds.due <= 20.0 + PAUSE, "all were tried: the shortest pause"


def test_each_host_has_an_order_of_its_own() -> None:
    chance = random.Random(3)
    orders = set()
    for _ in range(300):
        rounds = Rounds(3, chance.random)
        order = []
        for _ in range(3):
            order.append(rounds.present)
            rounds.failed(0.0)
        orders.add(tuple(order))
    assert len(orders) == 6
