# The positive control of test_agreement.py: faults that its machine must find.
from __future__ import annotations

from concurrent.futures import InvalidStateError
from typing import Any

import pytest
from test_agreement import FULL, few_entries, play

from dispatcher.core import Core
from dispatcher.decisions.ledger import Ledger
from dispatcher.decisions.turns import Turns
from dispatcher.hosts.fanout import Fanout
from dispatcher.store.commits import Commit, Failed, Saved
from slash32.sync import Publisher

__all__ = ["few_entries"]


def _nobodys(ledger: Ledger, name: str) -> None:
    for key in ledger._keys_of(name):
        ledger._bearers[key].discard(name)
        ledger.keys.pop(key, None)


def _forgets_one(ledger: Ledger, mark: int = 0) -> None:
    for (table, key, before), _ in reversed(ledger._undo[mark + 1 :]):
        ledger._set(table, key, before)
    del ledger._undo[mark:], ledger.writes[mark:]


def _in_any_order(ledger: Ledger, mark: int = 0) -> None:
    for (table, key, before), _ in reversed(ledger._undo[mark:]):
        ledger._set(table, key, before)
    del ledger._undo[mark:], ledger.writes[mark:]


def _sure(turns: Turns, why: Failed) -> None:
    FAIL(turns, Failed(why.reason))


def _never_told(turns: Turns, why: Failed) -> None:
    turns.ledger.undo()
    turns._batch = []


def _twice(turns: Turns) -> None:
    UNDO(turns)
    turns._waiting[1].extend([each for each in turns._waiting[1] if not each.patient][:1])


def _received_is_settled(core: Core, session: Any) -> int:
    publisher = core.fanout.publishers[session.host]
    if not publisher.live:
        return int(session.hello.revision)
    return core.revision if publisher.unsettled is None else max(publisher.unsettled - 1, 0)


def _sent_is_settled(publisher: Publisher, revision: int) -> bool:
    return publisher.live and not publisher.waiting


def _all_but_deletes(ledger: Ledger, saved: Saved) -> Commit:
    found = DIFFERENCE(ledger, saved)
    return Commit(found.revision, tuple(write for write in found.writes if write.record is not None))


def _one_stands_for_one(publisher: Publisher, revision: int, digest: int, edits: Any, first: int) -> Any:
    return PUSH(publisher, revision, digest, edits)


FAIL, UNDO, DIFFERENCE, PUSH = Turns._fail, Turns._undo, Ledger.difference, Publisher.push
SEEDS: dict[str, tuple[type, str, Any]] = {
    "a key that goes on to another host is nobody's": (Ledger, "_forget_keys", _nobodys),
    "what was written first stays": (Ledger, "undo", _forgets_one),
    "what comes back stands last": (Ledger, "undo", _in_any_order),
    "an unknown end is told as a certain one": (Turns, "_fail", _sure),
    "who failed is never told": (Turns, "_fail", _never_told),
    "decided twice": (Turns, "_undo", _twice),
    "what was received is in the kernel": (Core, "settled", _received_is_settled),
    "what was sent is in the kernel": (Publisher, "has", _sent_is_settled),
    "where too much was missed, the last commit is told as one": (Publisher, "push", _one_stands_for_one),
    "what is not needed any more is sent": (Fanout, "needed", lambda fanout, host, key: fanout.whole(key)),
    "what was deleted while too much was missed stays": (Ledger, "difference", _all_but_deletes),
}


TRIES = 5  # some need a rare order of things
SLOW = (
    "what was received is in the kernel",
    "what is not needed any more is sent",
    "an unknown end is told as a certain one",
    "where too much was missed, the last commit is told as one",
)


@pytest.mark.parametrize("seed", SEEDS if FULL else sorted(SEEDS.keys() - set(SLOW)))
def test_it_finds(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, instead = SEEDS[seed]
    monkeypatch.setattr(where, what, instead)
    for _ in range(TRIES):
        try:
            play(3000, shrink=False)
        except (AssertionError, KeyError, InvalidStateError):
            return
    pytest.fail("not found")
