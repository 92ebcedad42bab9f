# Owns: what the kernel must hold for a guest to send at all: its interface index, MAC and addresses, as elements of
# the anti-spoof sets; and the way back from dumped elements to whole admissions. Pure.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from slash32.net import Address, Prefix, version

from . import kernel as k
from .intervals import prefixes_of
from .skeleton import BEHIND, MACS, SENDERS, SENDERS_BEHIND, SOURCE

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


def _grants(element: Element) -> Iterator[Granted]:
    if element.set in BEHIND.values():
        key, width = element.key, 4 if element.set == BEHIND[4] else 16
        span = int.from_bytes(key[4 : 4 + width], "big"), int.from_bytes(element.last[4 : 4 + width], "big")
        mac = key[4 + width : 10 + width]
        for prefix in prefixes_of(span, width):
            yield int.from_bytes(key[:4], "big"), mac, prefix
    elif element.set in SOURCE.values():
        key = element.key
        yield int.from_bytes(key[:4], "little"), key[-8:-2], key[4:-8]


def whole(dumped: Iterable[Element]) -> tuple[frozenset[Granted], frozenset[Element]]:
    """The grants of which every element is there, and the elements that belong to none of these."""
    present = set(dumped)
    granted: set[Granted] = set()
    used: set[Element] = set()
    for element in present:
        for grant in _grants(element):
            needed = {*_own(grant), *_common(grant[0], grant[1], _is_v4(grant[2]))}
            if element in needed and needed <= present:
                granted.add(grant)
                used |= needed
    return frozenset(granted), frozenset(present - used)


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
