# Owns: how far each commit has got: which hosts have it in their kernels, and how long that took, also of hosts that
# another dispatcher serves: whom a commit concerns is known everywhere. Pure; seconds are the caller's monotonic clock.
from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT = 256  # commits whose time is remembered


class Took(NamedTuple):
    """Milliseconds from the start of a commit to the last acknowledgement (or to now), and to those of half and 99 % of
    the hosts that it concerns, that were connected, and that have acknowledged it (None: nobody has)."""

    last: float
    median: float | None
    p99: float | None
    counted: int = 0  # those hosts


@dataclass(slots=True)
class _Commit:
    begun: float
    waiting: int  # connected hosts that it concerns and that have not acknowledged it
    finished: float | None = None
    took: array[float] = field(default_factory=lambda: array("f"))  # seconds, of each host that has


class Commits:
    def __init__(self, completed: Callable[[float], None] = lambda seconds: None) -> None:
        """`completed` is told how long each commit took to its last acknowledgement."""
        self._completed = completed
        self._commits: OrderedDict[int, _Commit] = OrderedDict()
        self._owed: dict[str, deque[tuple[int, float]]] = {}  # host -> commits that wait for it and their starts
        self._beyond: dict[str, deque[int]] = {}  # host that is not connected here -> commits that concern it
        self._first: int | None = None  # the first commit that was seen by itself, and all after it

    def add(self, revision: int, begun: float, now: float, hosts: list[str], away: Collection[str] = ()) -> None:
        """A commit was made, and `hosts` were sent it or will be; it concerns those `away`, too."""
        last = next(reversed(self._commits), None)
        if last is None:
            self._first = revision
        elif revision > last + 1:  # several at once: what each of them concerned is not known
            self._first = revision + 1
        for host in away:
            beyond = self._beyond.get(host)
            if beyond is None:
                beyond = self._beyond[host] = deque(maxlen=KEPT)
            beyond.append(revision)
        self._commits[revision] = _Commit(begun, len(hosts), None if hosts else now)
        for host in hosts:
            owed = self._owed.get(host)
            if owed is None:
                owed = self._owed[host] = deque(maxlen=KEPT)
            owed.append((revision, begun))
        if len(self._commits) > KEPT:
            self._commits.popitem(last=False)

    def acknowledged(self, host: str, unsettled: int | None, now: float) -> bool:
        """The host has all before `unsettled` (None: all). True where that completes a commit."""
        owed, done = self._owed.get(host), False
        while owed and (unsettled is None or owed[0][0] < unsettled):
            revision, begun = owed.popleft()
            commit = self._commits.get(revision)
            if commit is not None:
                commit.took.append(now - begun)
                commit.waiting -= 1
                if commit.waiting == 0:
                    commit.finished, done = now, True
                    self._completed(now - commit.begun)
        return done

    def elsewhere(self, host: str, settled: int, now: float, counts: bool) -> None:
        """A host that another dispatcher serves has all up to `settled`. `counts`: it was there before, too."""
        beyond = self._beyond.get(host)
        while beyond and beyond[0] <= settled:
            commit = self._commits.get(beyond.popleft())
            if commit is not None and counts:
                commit.took.append(now - commit.begun)
                if commit.waiting == 0:
                    commit.finished = now

    def concerned(self, host: str, settled: int, revision: int) -> bool:
        """Whether a host that has all up to `settled`, and is not connected here, may lack something of `revision`."""
        if settled >= revision:
            return False
        beyond, owed = self._beyond.get(host, ()), self._owed.get(host, ())
        if not settled or self._first is None or settled < self._first - 1 or KEPT in (len(beyond), len(owed)):
            return True  # nobody here knows
        return any(settled < each <= revision for each in (*beyond, *(each for each, _ in owed)))

    def forget(self, host: str) -> None:
        """It is no host any more."""
        self._owed.pop(host, None)
        self._beyond.pop(host, None)

    def lag(self, host: str, now: float) -> float:
        """Seconds since the oldest commit that the host has not acknowledged; 0 where there is none."""
        owed = self._owed.get(host)
        return max(0.0, now - owed[0][1]) if owed else 0.0

    def of(self, revision: int, now: float) -> Took | None:
        """None where it is too long ago."""
        commit = self._commits.get(revision)
        if commit is None:
            return None
        last = ((now if commit.finished is None else commit.finished) - commit.begun) * 1000
        took = sorted(commit.took)
        if not took:
            return Took(last, None, None)
        median, p99 = (took[min(len(took) - 1, len(took) * part // 100)] * 1000 for part in (50, 99))
        return Took(last, median, p99, len(took))
