# Owns: which host needs which object, by counted reasons; an object that is needed needs others itself (a policy its
# sets and its tier). Pure.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from slash32.pack import ObjectKey

Needs = frozenset[ObjectKey]
Pair = tuple[str, ObjectKey]
_NOTHING: Needs = frozenset()
_NOBODY: Counter[ObjectKey] = Counter()


class Interest:
    def __init__(self) -> None:
        self._wants: dict[str, Counter[ObjectKey]] = {}  # host -> reasons
        self._needs: dict[ObjectKey, Needs] = {}
        self._touched: dict[Pair, bool] = {}  # since the last take: was it there before

    def add_host(self, name: str) -> None:
        self._wants.setdefault(name, Counter())

    def remove_host(self, name: str) -> None:
        """What it wanted is lost to it: it may be back before the next `take`."""
        for key in self._wants.pop(name):
            self._touched.setdefault((name, key), True)

    def needs(self, key: ObjectKey) -> Needs:
        return self._needs.get(key, _NOTHING)

    def set_needs(self, key: ObjectKey, needs: Needs) -> None:
        """From now on, whoever wants the object wants these."""
        before = self.needs(key)
        if needs == before:
            return
        for host in [host for host, wants in self._wants.items() if key in wants]:
            for needed in needs - before:
                self.want(host, needed, 1)
            for needed in before - needs:
                self.want(host, needed, -1)
        if needs:
            self._needs[key] = needs
        else:
            del self._needs[key]

    def want(self, host: str, key: ObjectKey, by: int) -> None:
        """One reason more, or less."""
        wants = self._wants[host]
        before = wants[key]
        wants[key] = before + by
        if before and before + by:
            return
        self._touched.setdefault((host, key), before > 0)
        if not wants[key]:
            del wants[key]
        for needed in self._needs.get(key, _NOTHING):
            self.want(host, needed, by)

    def take(self) -> tuple[list[Pair], list[Pair]]:
        """Gained and lost since it was last asked."""
        gained: list[Pair] = []
        lost: list[Pair] = []
        for (host, key), before in self._touched.items():
            if (key in self._wants.get(host, _NOBODY)) != before:
                (lost if before else gained).append((host, key))
        self._touched = {}
        return gained, lost

    def __iter__(self) -> Iterator[Pair]:
        """All that is wanted or needs something: nothing, once everything was taken back."""
        for host, wants in self._wants.items():
            yield from ((host, key) for key in wants)
        yield from (("", key) for key in self._needs)
