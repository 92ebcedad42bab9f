# Owns: noticing what others change in iptables and ipset: nothing tells of it, so sizes and counts are compared, which
# is cheap. Our own writes say what they touched. Touches: asks the kernel.
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from . import entries
from .sets import Sets
from .skeleton import TABLES


class Watch:
    def __init__(self, sets: Sets, versions: tuple[int, ...], bridges: Callable[[], Collection[str]]) -> None:
        self._sets, self._versions, self._bridges = sets, versions, bridges
        self._tables: object = None
        self._headers: dict[str, bytes] = {}
        self._known_bridges: frozenset[str] = frozenset()

    def changed(self) -> bool:
        return (
            self._infos() != self._tables
            or self._sets.headers_raw() != self._headers
            or frozenset(self._bridges()) != self._known_bridges
        )

    def settled(self) -> None:
        """What is there now is what is to be."""
        self._tables, self._headers = self._infos(), self._sets.headers_raw()
        self._known_bridges = frozenset(self._bridges())

    def wrote_tables(self) -> None:
        """Which are what sets are referred to from: that is in what their headers say, too."""
        self._tables, self._headers = self._infos(), self._sets.headers_raw()

    def wrote_sets(self, names: Iterable[str]) -> None:
        for name in names:
            found = self._sets.headers_raw(name)
            if name in found:
                self._headers[name] = found[name]
            else:
                self._headers.pop(name, None)

    def _infos(self) -> object:
        return tuple(entries.info(version, name) for version in self._versions for name in TABLES)

