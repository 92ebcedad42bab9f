# Owns: who watches the commits: the last ones, as events, and the watchers' queues, all of them bounded: who does not
# keep up is cut off, who comes too late is told to begin anew. Pure; one thread.
from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from slash32 import resources
from slash32.net import format_address

from ..store.commits import Commit, Holding, Table, Write

KEPT = 1024  # commits,
KEPT_WRITES = 100_000  # or what they hold together
WATCHERS = 256
QUEUED = 1024  # events that wait for one watcher,
QUEUED_BYTES = 8 << 20  # or bytes of them; one event may have more


@dataclass(slots=True, eq=False)
class Watcher:
    """`wake` is called when there is something to take, or when it was cut off."""

    wake: Callable[[], None]
    begun: int = 0  # revision: all after it was put here, or will be
    waiting: deque[bytes] = field(default_factory=deque)
    size: int = 0
    cut: bool = False

    def put(self, event: bytes) -> None:
        if len(self.waiting) >= QUEUED or (self.waiting and self.size + len(event) > QUEUED_BYTES):
            self.cut = True
            self.waiting.clear()
        elif not self.cut:
            self.waiting.append(event)
            self.size += len(event)
        self.wake()

    def take(self) -> bytes:
        """One event, or nothing."""
        if not self.waiting:
            return b""
        event = self.waiting.popleft()
        self.size -= len(event)
        return event


@dataclass(slots=True)
class _Kept:
    commit: Commit
    event: bytes | None = None  # made when somebody wants it

    def text(self) -> bytes:
        if self.event is None:
            self.event = commit_event(self.commit)
        return self.event


class Watchers:
    def __init__(self, revision: int) -> None:
        """`revision`: the last one there is; whoever has seen it has missed nothing."""
        self.revision = revision
        self._kept: deque[_Kept] = deque()
        self._writes = 0
        self._watching: set[Watcher] = set()

    def __len__(self) -> int:
        return len(self._watching)

    def subscribe(self, since: int | None, wake: Callable[[], None]) -> Watcher | None:
        """What was committed after `since`, and all that will be (None: only that). None: there are too many."""
        if len(self._watching) >= WATCHERS:
            return None
        watcher = Watcher(wake, self.revision)
        if since is not None and since != self.revision:
            watcher.begun = since
            missed = self._after(since)
            # No more than its queue takes: else it would be cut off before it could read a word.
            if missed is None or len(missed) >= QUEUED // 2 or sum(map(len, missed)) > QUEUED_BYTES // 2:
                missed = [reset_event(self.revision)]
            for event in missed:
                watcher.put(event)
        self._watching.add(watcher)
        return watcher

    def _after(self, since: int) -> list[bytes] | None:
        if not self._kept or not self._kept[0].commit.revision - 1 <= since < self.revision:
            return None
        return [text for kept in self._kept if kept.commit.revision > since and (text := kept.text())]

    def unsubscribe(self, watcher: Watcher) -> None:
        self._watching.discard(watcher)

    def publish(self, commit: Commit) -> None:
        """The next one; where some were not told, all watchers begin anew."""
        if commit.revision != self.revision + 1:
            self.reset(commit.revision)
            return
        self.revision = commit.revision
        kept = _Kept(commit)
        self._kept.append(kept)
        self._writes += len(commit.writes)
        while len(self._kept) > 1 and (len(self._kept) > KEPT or self._writes > KEPT_WRITES):
            self._writes -= len(self._kept.popleft().commit.writes)
        if self._watching and kept.text():
            self._tell(kept.text())

    def reset(self, revision: int) -> None:
        """The content is another one now."""
        self.revision = revision
        self._kept.clear()
        self._writes = 0
        self._tell(reset_event(revision))

    def cut_all(self) -> None:
        """They may come back later."""
        for watcher in self._watching:
            watcher.cut = True
            watcher.wake()

    def _tell(self, event: bytes) -> None:
        for watcher in self._watching:
            watcher.put(event)


def commit_event(commit: Commit) -> bytes:
    """Nothing where it changed nothing that is shown."""
    changes = [change for write in commit.writes if (change := _change(write)) is not None]
    return _event("commit", commit.revision, {"changes": changes}) if changes else b""


def reset_event(revision: int) -> bytes:
    return _event("reset", revision, {})


def alive(revision: int) -> bytes:
    """Says nothing, but from where to go on."""
    return f": alive\nid: {revision}\n\n".encode()


def _event(kind: str, revision: int, more: dict[str, Any]) -> bytes:
    data = json.dumps({"revision": revision, **more})
    return f"event: {kind}\nid: {revision}\ndata: {data}\n\n".encode()


def _change(write: Write) -> dict[str, Any] | None:
    table, key, record = write
    if table is Table.RESOURCE:
        kind, name = key
        found = None if record is None else resources.encode(record)  # type: ignore[arg-type]
    elif table is Table.ENDPOINT:
        kind, name = "Endpoint", "/".join(key)
        found = _endpoint(record) if isinstance(record, Holding) else None
    else:
        return None
    shown: dict[str, Any] = {"kind": kind, "name": name, "change": "deleted" if record is None else "put"}
    return shown if found is None else {**shown, "object": found}


def _endpoint(holding: Holding) -> dict[str, Any]:
    """As GET /v1/endpoints has it, but for the effective labels: they depend on profiles, too."""
    e = holding.endpoint
    return {
        "uuid": e.key.uuid,
        "mac": e.key.mac,
        "domain": e.domain,
        "host": holding.host,
        "labels": dict(sorted(e.labels.items())),
        "profiles": list(e.profiles),
        "addresses": [format_address(a) for a in e.addresses],
        "shared": [{"address": format_address(s.address), "group": s.group} for s in e.shared],
        "prefixes": [str(p) for p in e.prefixes],
    }
