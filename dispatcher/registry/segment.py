# Owns: what every host is told, since all stand on one segment: hosts' next hops, and behind which host what is; and
# who holds which address. Pure.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from slash32.model import Endpoint
from slash32.net import Address, Prefix, host_prefix
from slash32.pack import Kind, ObjectKey
from slash32.unicast import unusable

from .changes import Changes
from .ownership import Owner, Ownership, holdings, what


class Segment:
    def __init__(self, changes: Changes) -> None:
        self.ownership = Ownership()
        self._changes = changes
        self._next_hops: dict[str, tuple[Prefix, ...]] = {}
        self._routes: dict[Prefix, Counter[str]] = {}
        self._held: Counter[str] = Counter()  # by host: addresses and prefixes of its endpoints

    def set_next_hops(self, name: str, addresses: tuple[Address, ...]) -> None:
        self._changes.touch(ObjectKey(Kind.HOST, name), self.next_hops(name) or None)
        owner = Owner(name, None, name)
        for prefix in self._next_hops.pop(name, ()):
            self.ownership.remove(owner, prefix)
        for prefix in map(host_prefix, addresses):
            self.ownership.add(owner, prefix)
            self._next_hops[name] = (*self._next_hops.get(name, ()), prefix)

    def next_hops(self, name: str) -> tuple[Address, ...]:
        return tuple(prefix.network for prefix in self._next_hops.get(name, ()))

    def conflicts(self, name: str, addresses: tuple[Address, ...]) -> Iterator[str]:
        """With what others hold."""
        for prefix in map(host_prefix, addresses):
            for _, other in self.ownership.overlapping(prefix):
                if other.key is not None or other.host != name:
                    yield f"{what(prefix)} is in use by {other}"

    def hold(self, host: str, endpoint: Endpoint) -> None:
        for prefix, owner in holdings(host, endpoint):
            self.ownership.add(owner, prefix)
            self._held[host] += 1
            self._route(prefix, host, 1)

    def let_go(self, host: str, endpoint: Endpoint) -> None:
        for prefix, owner in holdings(host, endpoint):
            self.ownership.remove(owner, prefix)
            self._held[host] -= 1
            self._route(prefix, host, -1)
        if not self._held[host]:
            del self._held[host]

    def held(self, host: str) -> int:
        return self._held[host]

    def behind(self, prefix: Prefix) -> tuple[str, ...]:
        """The hosts behind which it is."""
        return tuple(sorted(self._routes.get(prefix, ())))

    def _route(self, prefix: Prefix, host: str, by: int) -> None:
        self._changes.touch(ObjectKey(Kind.ROUTE, prefix), self.behind(prefix) or None)
        hosts = self._routes.setdefault(prefix, Counter())
        hosts[host] += by
        if not hosts[host]:
            del hosts[host]
        if not hosts:
            del self._routes[prefix]

    def __len__(self) -> int:
        """How much is kept: 0, once everything was taken back."""
        return len(self._next_hops) + len(self._routes) + len(self._held)


def no_next_hops(addresses: tuple[Address, ...]) -> Iterator[str]:
    for prefix in map(host_prefix, addresses):
        why = unusable(prefix)
        if why is not None:
            yield f"{what(prefix)} is {why}"
    if len({len(address) for address in addresses}) < len(addresses):
        yield "two addresses of one IP version"
