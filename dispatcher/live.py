# Owns: how far each commit has got: which hosts have it in their kernels, and how long that took. Pure; seconds are
# the caller's monotonic clock.
from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

KEPT = 256  # commits whose time is remembered


@dataclass(slots=True)
class _Commit:
    begun: float
    waiting: int  # connected hosts that it concerns and that have not acknowledged it
    finished: float | None = None


class Commits:
    def __init__(self) -> None:
        self._commits: OrderedDict[int, _Commit] = OrderedDict()
        self._owed: dict[str, deque[int]] = {}  # host -> commits that wait for it, oldest first

    def add(self, revision: int, begun: float, now: float, hosts: list[str]) -> None:
        """A commit was made, and `hosts` were sent it or will be."""
        self._commits[revision] = _Commit(begun, len(hosts), None if hosts else now)
        for host in hosts:
            owed = self._owed.get(host)
            if owed is None:
                owed = self._owed[host] = deque(maxlen=KEPT)
            owed.append(revision)
        if len(self._commits) > KEPT:
            self._commits.popitem(last=False)

    def acknowledged(self, host: str, unsettled: int | None, now: float) -> bool:
        """The host has all before `unsettled` (None: all). True where that completes a commit."""
        owed, done = self._owed.get(host), False
        while owed and (unsettled is None or owed[0] < unsettled):
            commit = self._commits.get(owed.popleft())
            if commit is not None:
                commit.waiting -= 1
                if commit.waiting == 0:
                    commit.finished, done = now, True
        return done

    def milliseconds(self, revision: int, now: float) -> float | None:
        """From the start of the commit to the last acknowledgement, or to now; None where it is too long ago."""
        commit = self._commits.get(revision)
        if commit is None:
            return None
        return ((now if commit.finished is None else commit.finished) - commit.begun) * 1000
