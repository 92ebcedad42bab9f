# Watchers of commits: what they are told, and the measure of what is kept for them.
from __future__ import annotations

import json

from dispatcher.api import watchers
from dispatcher.api.watchers import Watcher, Watchers, alive
from dispatcher.store.commits import Commit, Holding, HostState, Table, Write
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.policy import Tier


def commit(revision: int, name: str = "t") -> Commit:
    return Commit(revision, (Write(Table.RESOURCE, ("Tier", name), Tier(name, 1.0)),))


def told(watcher: Watcher) -> list[tuple[str, int]]:
    found = []
    while event := watcher.take():
        kind, number, data = (line.partition(": ")[2] for line in event.decode().strip().split("\n"))
        assert json.loads(data)["revision"] == int(number)
        found.append((kind, int(number)))
    return found


class Wake:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def subscribed(all_: Watchers, since: int | None = None) -> Watcher:
    watcher = all_.subscribe(since, Wake())
    assert watcher is not None
    return watcher


def test_live_and_resumed() -> None:
    all_ = Watchers(5)
    live, present = subscribed(all_), subscribed(all_, 5)
    for revision in (6, 7, 8):
        all_.publish(commit(revision))
    commits = [("commit", 6), ("commit", 7), ("commit", 8)]
    assert told(live) == told(present) == told(subscribed(all_, 5)) == commits
    assert told(subscribed(all_, 7)) == commits[2:]
    assert told(subscribed(all_, 8)) == []
    assert told(subscribed(all_, 4)) == told(subscribed(all_, 9)) == [("reset", 8)]
    assert isinstance(live.wake, Wake) and live.wake.times == 3


def test_where_one_is_missing_all_begin_anew() -> None:
    all_ = Watchers(5)
    live = subscribed(all_)
    all_.publish(commit(6))
    all_.publish(commit(9))
    all_.publish(commit(10))
    assert told(live) == [("commit", 6), ("reset", 9), ("commit", 10)]
    assert told(subscribed(all_, 6)) == [("reset", 10)], "what was between is not known"
    assert told(subscribed(all_, 9)) == [("commit", 10)]


def test_what_is_told_of_a_change() -> None:
    key = EndpointKey("00000000-0000-0000-0000-000000000001", "52:54:00:00:00:01")
    endpoint = Endpoint(key, "web\n1", {"role": "web"}, addresses=(parse_address("10.0.0.1"),))
    writes = (
        Write(Table.ENDPOINT, tuple(key), Holding("h1", endpoint)),
        Write(Table.RESOURCE, ("Tier", "old"), None),
        Write(Table.HOST, ("h1",), HostState(fenced="x")),
    )
    event = watchers.commit_event(Commit(3, writes))
    assert event.count(b"\n") == 4, "one line of data, whatever names hold"
    put, gone = json.loads(event.split(b"data: ")[1])["changes"]
    assert put["object"]["domain"] == "web\n1" and put["object"]["host"] == "h1"
    assert gone == {"kind": "Tier", "name": "old", "change": "deleted"}
    assert watchers.commit_event(Commit(4, writes[2:])) == b"", "hosts' bookkeeping is nobody's news"


def test_commits_that_nobody_sees_are_no_gap() -> None:
    all_ = Watchers(0)
    live = subscribed(all_)
    all_.publish(Commit(1, (Write(Table.HOST, ("h1",), None),)))
    all_.publish(commit(2))
    assert told(live) == told(subscribed(all_, 0)) == [("commit", 2)]
    assert alive(2) == b": alive\nid: 2\n\n"


def test_what_is_kept_is_bounded() -> None:
    all_ = Watchers(0)
    for revision in range(1, 2 * watchers.KEPT):
        all_.publish(commit(revision))
    last = 2 * watchers.KEPT - 1
    assert told(subscribed(all_, last - 10)) == [("commit", last - 9 + n) for n in range(10)]
    assert told(subscribed(all_, last - watchers.KEPT - 1)) == [("reset", last)]
    many = commit(last + 1).writes * (watchers.KEPT_WRITES // 2)
    for revision in range(last + 1, last + 5):
        all_.publish(Commit(revision, many))
    assert told(subscribed(all_, last)) == [("reset", last + 4)]


def test_who_does_not_take_is_cut_off() -> None:
    all_ = Watchers(0)
    slow, quick = subscribed(all_), subscribed(all_)
    for revision in range(1, watchers.QUEUED + 2):
        all_.publish(commit(revision))
        assert told(quick) == [("commit", revision)]
    assert slow.cut and not slow.waiting and slow.take() == b""
    assert not quick.cut
    all_.unsubscribe(slow)
    assert len(all_) == 1


def test_bytes_are_bounded_but_one_event_may_be_large() -> None:
    watcher = Watcher(lambda: None)
    watcher.put(b"x" * (watchers.QUEUED_BYTES + 1))
    assert not watcher.cut
    watcher.put(b"x")
    assert watcher.cut and not watcher.waiting


def test_there_is_a_most() -> None:
    all_ = Watchers(0)
    all_there_may_be = [subscribed(all_) for _ in range(watchers.WATCHERS)]
    assert all_.subscribe(None, Wake()) is None
    all_.unsubscribe(all_there_may_be[0])
    assert all_.subscribe(None, Wake()) is not None
