# Owns: what the kernel must hold for a guest to send at all: its interface index, MAC and addresses, as elements of
# the anti-spoof sets; and the way back from dumped elements to whole admissions. Pure.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import NamedTuple

from slash32.net import Address, Prefix, version

from . import kernel as k
from .intervals import prefixes_of
from .shapes import BEHIND, MACS, SENDERS, SENDERS_BEHIND, SOURCE

PLAIN = {SOURCE[4]: k.INET, SOURCE[6]: k.INET, MACS: k.INET, SENDERS: k.ARP}  # hash sets, and their table's family
Granted = tuple[int, bytes, Address | Prefix]  # ifindex, MAC, and one thing it may send from


class Element(NamedTuple):
    family: int
    set: str
    key: bytes
    last: bytes = b""  # of a range, inclusive


class Admission(NamedTuple):
    """One endpoint's right to send: from these addresses and prefixes, with this MAC, on this interface."""

    ifindex: int
    mac: bytes
    addresses: tuple[Address, ...] = ()
    prefixes: tuple[Prefix, ...] = ()

    def grants(self) -> Iterator[Granted]:
        """In the form of read()'s admissions."""
        for address in self.addresses:
            yield self.ifindex, self.mac, address
        for prefix in self.prefixes:
            yield self.ifindex, self.mac, prefix

    def elements(self) -> list[Element]:
        found = [e for grant in self.grants() for e in _own(grant)]
        if found:
            found += _common(self.ifindex, self.mac, any(version(a) == 4 for a in self._networks()))
        return found

    def _networks(self) -> Iterator[Address]:
        yield from self.addresses
        for prefix in self.prefixes:
            yield prefix.network


def _own(grant: Granted) -> Iterator[Element]:
    """Of one address or prefix. Interval sets compare in network order, so their interface index is written so."""
    ifindex, mac, source = grant
    if isinstance(source, Prefix):
        head = ifindex.to_bytes(4, "big")
        first, last = source.bounds()
        tail = mac + b"\0\0"
        yield Element(k.INET, BEHIND[source.version], head + first + tail, head + last + tail)
        if source.version == 4:
            yield Element(k.ARP, SENDERS_BEHIND, head + first + tail + tail, head + last + tail + tail)
        return
    head = ifindex.to_bytes(4, "little")
    yield Element(k.INET, SOURCE[version(source)], head + source + mac + b"\0\0")
    if len(source) == 4:
        yield _sender(ifindex, mac, source)


def _sender(ifindex: int, mac: bytes, address: Address) -> Element:
    tail = mac + b"\0\0"
    return Element(k.ARP, SENDERS, ifindex.to_bytes(4, "little") + address + tail + tail)


def _common(ifindex: int, mac: bytes, has_v4: bool) -> list[Element]:
    """Once per endpoint: its MAC, and ARP probes, whose sender address is 0.0.0.0."""
    own = [Element(k.INET, MACS, ifindex.to_bytes(4, "little") + mac + b"\0\0")]
    return [*own, _sender(ifindex, mac, bytes(4))] if has_v4 else own


def _ranges(element: Element) -> Iterator[Granted]:
    """What a range of one of the interval sets grants; nothing unless it is one prefix, as ours all are."""
    if element.set not in BEHIND.values():
        return
    key, width = element.key, 4 if element.set == BEHIND[4] else 16
    span = int.from_bytes(key[4 : 4 + width], "big"), int.from_bytes(element.last[4 : 4 + width], "big")
    prefixes = list(prefixes_of(span, width))
    if len(prefixes) == 1:
        yield int.from_bytes(key[:4], "big"), key[4 + width : 10 + width], prefixes[0]


def whole(plain: Mapping[str, Set[bytes]], ranges: Set[Element]) -> tuple[frozenset[Granted], frozenset[Element]]:
    """The grants of which every element is there, and the elements that belong to none of these."""
    used: dict[str, set[bytes]] = {name: set() for name in PLAIN}
    granted = {grant for v in SOURCE for grant in _single(v, plain, used)}
    used_ranges: set[Element] = set()
    for element in ranges:
        for grant in _ranges(element):
            needed = {*_own(grant), *_common(grant[0], grant[1], _is_v4(grant[2]))}
            singles = {e for e in needed if not e.last}
            if element in needed and needed - singles <= ranges and all(e.key in plain[e.set] for e in singles):
                granted.add(grant)
                used_ranges |= needed - singles
                for single in singles:
                    used[single.set].add(single.key)
    rest = {Element(family, n, key) for n, family in PLAIN.items() for key in plain[n] - used[n]}
    return frozenset(granted), frozenset(rest | (ranges - used_ranges))


def _single(version: int, plain: Mapping[str, Set[bytes]], used: dict[str, set[bytes]]) -> Iterator[Granted]:
    """Of single addresses; they are many, so that elements are put together here, as in _own and _common, by hand."""
    macs, senders = plain[MACS], plain[SENDERS]
    for key in plain[SOURCE[version]]:
        head, tail = key[:4], key[-8:]
        mac = head + tail
        arp = (key + tail, head + b"\0\0\0\0" + tail + tail) if version == 4 else ()
        if mac in macs and all(a in senders for a in arp):
            used[SOURCE[version]].add(key)
            used[MACS].add(mac)
            used[SENDERS].update(arp)
            yield int.from_bytes(head, "little"), tail[:6], key[4:-8]


def _is_v4(source: Address | Prefix) -> bool:
    return (source.version if isinstance(source, Prefix) else version(source)) == 4


def group(granted: Iterable[Granted]) -> Mapping[tuple[int, bytes], Admission]:
    """One admission per interface and MAC, its parts sorted."""
    found: dict[tuple[int, bytes], tuple[list[Address], list[Prefix]]] = {}
    for ifindex, mac, source in granted:
        addresses, prefixes = found.setdefault((ifindex, mac), ([], []))
        if isinstance(source, Prefix):
            prefixes.append(source)
        else:
            addresses.append(source)
    return {key: Admission(*key, tuple(sorted(a)), tuple(sorted(p))) for key, (a, p) in found.items()}
