# Which news of a guest counts: libvirt's events and reads come from other threads and may be older than its hooks.
from __future__ import annotations

from types import SimpleNamespace

import pytest

from hostd.guests.operations import AWAY, LATE, Operations

XML = b"<domain><name>g</name><uuid>00000000-0000-0000-0000-000000000001</uuid></domain>"
UUID = "00000000-0000-0000-0000-000000000001"


class Agent:
    """Notes who was asked what."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        def call(*given: object) -> None:
            self.calls.append(name)
            if name in ("prepare", "incoming", "started"):
                given[1](0, "")  # type: ignore[operator]

        return call


class Notes:
    def __init__(self) -> None:
        self.agent, self.scans = Agent(), 0
        self.operations = Operations(self.agent, self._scan)  # type: ignore[arg-type]

    def _scan(self) -> None:
        self.scans += 1

    def hook(self, operation: str, suboperation: str = "begin", now: float = 0.0) -> int:
        answers: list[int] = []
        request = SimpleNamespace(
            driver="qemu", operation=operation, suboperation=suboperation, xml=XML,
            answer=lambda code, message="": answers.append(code) or True,
        )  # fmt: skip
        self.operations.hook(request, now)
        (code,) = answers
        return code


@pytest.fixture
def notes() -> Notes:
    return Notes()


CALLS = [
    ("prepare", "begin", ["prepare"]),
    ("migrate", "begin", ["incoming"]),
    ("start", "begin", ["started"]),
    ("started", "begin", ["started"]),
    ("stopped", "end", ["stopped", "settle"]),
    ("release", "end", ["released", "settle"]),
    ("reconnect", "begin", []),
    ("restore", "begin", []),
    ("attach", "begin", []),
    ("prepare", "end", []),
    ("", "", []),
]


@pytest.mark.parametrize(("operation", "suboperation", "calls"), CALLS)
def test_every_operation_is_answered_once(notes: Notes, operation: str, suboperation: str, calls: list[str]) -> None:
    assert notes.hook(operation, suboperation) == 0
    assert notes.agent.calls == calls
    assert notes.scans == (operation == "reconnect")


def test_an_end_is_late_news_after_a_start_for_a_while(notes: Notes) -> None:
    now = 1000.0
    assert not notes.operations.beginning(UUID, now)
    notes.hook("prepare", now=now)
    assert notes.operations.beginning(UUID, now + LATE - 1) and not notes.operations.beginning(UUID, now + LATE)
    notes.hook("stopped", "end", now=now + 1)
    assert not notes.operations.beginning(UUID, now + 2)


def test_sight_of_a_guest_is_late_news_after_its_end_for_a_while(notes: Notes) -> None:
    now = 1000.0
    notes.hook("release", "end", now=now)
    assert notes.operations.ended(UUID, now + LATE - 1) and not notes.operations.ended(UUID, now + LATE)
    notes.hook("prepare", now=now + 1)
    assert not notes.operations.ended(UUID, now + 2)


def test_a_scan_does_not_count_for_who_starts_meanwhile(notes: Notes) -> None:
    now = 1000.0
    notes.hook("prepare", now=now)
    assert notes.operations.begins(UUID, scan=now - 1, now=now + 500), "announced after the scan began, long as it took"
    assert notes.operations.begins(UUID, scan=now + 1, now=now + 2), "announced lately"
    assert not notes.operations.begins(UUID, scan=now + LATE, now=now + LATE + 1)


def test_a_guest_that_was_handed_over_is_not_here_whatever_was_read_before(notes: Notes) -> None:
    now = 1000.0
    notes.operations.left(UUID, now)
    assert notes.operations.left_lately(UUID, now + AWAY - 0.1) and not notes.operations.left_lately(UUID, now + AWAY)
    notes.operations.came_back(UUID)
    assert not notes.operations.left_lately(UUID, now)
    notes.operations.left(UUID, now)
    notes.hook("migrate", now=now + 1)
    assert not notes.operations.left_lately(UUID, now + 1), "it comes back by another migration"


def test_notes_do_not_pile_up(notes: Notes) -> None:
    for number in range(100):
        notes.operations._note(f"guest{number}", "prepare" if number % 2 else "release", 0.0)
        notes.operations.left(f"guest{number}", 0.0)
    notes.operations.forget(LATE - 1)
    assert len(notes.operations._beginning) == 50, "the control"
    notes.operations.forget(LATE)
    assert not notes.operations._beginning and not notes.operations._ended and not notes.operations._left
