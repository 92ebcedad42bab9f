# Owns: noticing what others change in iptables and ipset: nothing tells of it, so sizes and counts are compared. Of
# tables, and of the sets of who may send from where, that is cheap; of all sets it is not (the kernel counts their
# buckets), so that is done as often as costs this share of a core. Our own writes say what they touched. Touches: asks
# the kernel, reads the clocks.
from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from . import entries
from .names import OWN_SETS
from .sets import Sets
from .skeleton import TABLES

_SHARE = 0.005
_OFTEN = 0.25  # seconds: nobody asks more often


class Watch:
    def __init__(self, sets: Sets, versions: tuple[int, ...], bridges: Callable[[], Collection[str]]) -> None:
        self._sets, self._versions, self._bridges = sets, versions, bridges
        self._tables: object = None
        self._headers: dict[str, bytes] = {}
        self._known_bridges: frozenset[str] = frozenset()
        self._rests_until = 0.0
        self._missed = False
        self._ours: set[str] = set()  # sets that we wrote to after the last look, which costs a writer nothing

    def changed(self) -> bool:
        return (
            self._missed
            or self._infos() != self._tables
            or frozenset(self._bridges()) != self._known_bridges
            or self._differ(OWN_SETS, {n: b for own in OWN_SETS for n, b in self._sets.headers_raw(own).items()})
            or self._sets_changed()
        )

    def _differ(self, names: Collection[str], found: dict[str, bytes]) -> bool:
        """What we wrote to is taken for right as it is now; the audit looks closer."""
        for name in self._ours.intersection(names):
            if name in found:
                self._headers[name] = found[name]
            else:
                self._headers.pop(name, None)
        self._ours.difference_update(names)
        return any(found.get(name) != self._headers.get(name) for name in names)

    def _sets_changed(self) -> bool:
        now = time.monotonic()
        if now < self._rests_until:
            return False
        began = time.thread_time()
        found = self._sets.headers_raw()
        rest = (time.thread_time() - began) / _SHARE - _OFTEN
        self._rests_until = now + rest
        return self._differ(found.keys() | self._headers.keys() | self._ours, found)

    def settled(self) -> None:
        """What is there now is what is to be."""
        self._tables, self._headers = self._infos(), self._sets.headers_raw()
        self._missed = False
        self._ours.clear()
        self._known_bridges = frozenset(self._bridges())

    def begins(self) -> None:
        """We are about to write tables: what others have changed by now is not to be taken for ours afterwards."""
        self._missed = self._missed or self._infos() != self._tables

    def wrote(self, tables: bool, names: Iterable[str]) -> None:
        """These sets, and maybe tables."""
        if tables:
            self._tables = self._infos()
        self._ours.update(names)

    def _infos(self) -> object:
        return tuple(entries.info(version, name) for version in self._versions for name in TABLES)
