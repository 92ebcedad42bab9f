# Owns: every kind of match and verdict, once: its nft text and its kernel bytes side by side, so that they cannot
# drift. The bytes are those that nft itself makes of the text. Pure but for the attribute encoders.
from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from slash32.net import Address, Prefix, format_address

from . import kernel as k
from .intervals import Interval, interval_elements

NFPROTO = {4: 2, 6: 10}
SADDR = {4: 12, 6: 8}
DADDR = {4: 16, 6: 24}
IP = {4: "ip", 6: "ip6"}
_ICMP = {4: 1, 6: 58}
_CT = {"invalid": 1, "established": 2, "related": 4, "new": 8}
_COMMENT = 120  # bytes; nft's own limit is 127
_TAG = re.compile(r"[A-Za-z0-9.:-]{1,28}")
_INTERFACE = re.compile(r"[!#-)+-.0-\[\]-~]{1,15}")  # no blanks, quotes, slashes, nor what nft takes for a pattern
LOG_RATE = 10, 20  # entries a second and at once, of one rule

HOST, BIG, NONE = 1, 2, 0  # byte orders, as nft notes them on a set


class Anonymous(NamedTuple):
    """A constant set that lives and dies with its rule."""

    key_type: int
    key_length: int
    elements: tuple[bytes, ...]
    order: int = BIG
    interval: bool = False
    negate: bool = False


class Statement(NamedTuple):
    """A whole rule, ready to be written or shown."""

    text: str
    code: tuple[bytes | Anonymous, ...]
    comment: str
    digest: bytes

    @property
    def fingerprint(self) -> str:
        return f"{self.digest.hex()} {self.comment}"

    def __str__(self) -> str:
        return f'{self.text} comment "{self.comment}"' if self.comment else self.text


def safe_comment(comment: str) -> str:
    """What survives a listing and its re-load: printable ASCII without double quotes, bounded."""
    return "".join(c if " " <= c <= "~" and c != '"' else "?" for c in comment[:_COMMENT])


def host(number: int) -> bytes:
    return number.to_bytes(4, "little")


class Draft:
    """A rule under construction. Methods append one match or verdict each and return the draft."""

    def __init__(self) -> None:
        self._words: list[str] = []
        self._code: list[bytes | Anonymous] = []
        self._version = 0
        self._protocol = -1
        self._ether = False

    def done(self, comment: str = "") -> Statement:
        joined: list[bytes | Anonymous] = []
        for part in self._code:
            if joined and isinstance(part, bytes) and isinstance(joined[-1], bytes):
                joined[-1] += part
            else:
                joined.append(part)
        comment = safe_comment(comment)
        digest = hashlib.blake2s(repr(joined).encode() + comment.encode(), digest_size=8).digest()
        return Statement(" ".join(self._words), tuple(joined), comment, digest)

    def _add(self, words: str, *code: bytes | Anonymous) -> Draft:
        if words:
            self._words.append(words)
        self._code.extend(code)
        return self

    # -- what others depend on; nft adds these by itself before a match that needs them

    def _need_version(self, version: int) -> None:
        if self._version != version:
            self._version = version
            self._add("", k.meta(k.NFPROTO), k.compare(bytes([NFPROTO[version]])))

    def _need_protocol(self, number: int) -> None:
        if self._protocol != number:
            self._protocol = number
            self._add("", k.meta(k.L4PROTO), k.compare(bytes([number])))

    def _need_ether(self) -> None:
        if not self._ether:
            self._ether = True
            self._add("", k.meta(k.IIFTYPE), k.compare(b"\1\0"))

    # -- matches

    def family(self, version: int) -> Draft:
        if self._version == version:
            return self
        self._need_version(version)
        return self._add(f"meta nfproto ipv{version}")

    def protocol(self, number: int, negate: bool = False) -> Draft:
        if not negate and self._protocol == number:
            return self
        if not negate:
            self._need_protocol(number)
            return self._add(f"meta l4proto {number}")
        return self._add(f"meta l4proto != {number}", k.meta(k.L4PROTO), k.compare(bytes([number]), k.NEQ))

    def protocols(self, numbers: Sequence[int]) -> Draft:
        elements = tuple(k.element(bytes([n])) for n in sorted(numbers))
        words = ", ".join(map(str, sorted(numbers)))
        return self._add(f"meta l4proto {{ {words} }}", k.meta(k.L4PROTO), Anonymous(12, 1, elements, HOST))

    def ports(self, source: bool, intervals: Sequence[Interval], negate: bool = False) -> Draft:
        """Disjoint, sorted. Of the transport header, whatever the protocol is: match that before."""
        side, offset = ("sport", 0) if source else ("dport", 2)
        self._add("", k.payload(k.TRANSPORT, offset, 2))
        return self._among(f"th {side}", intervals, (2, 13), negate)

    def udp(self, source: int, destination: int) -> Draft:
        self._need_protocol(17)
        both = source.to_bytes(2, "big") + destination.to_bytes(2, "big")
        return self._add(f"udp sport {source} udp dport {destination}", k.payload(k.TRANSPORT, 0, 4), k.compare(both))

    def udp_to(self, ports: Sequence[int]) -> Draft:
        self._need_protocol(17)
        elements = tuple(k.element(p.to_bytes(2, "big")) for p in sorted(ports))
        words = ", ".join(map(str, sorted(ports)))
        return self._add(f"udp dport {{ {words} }}", k.payload(k.TRANSPORT, 2, 2), Anonymous(13, 2, elements))

    def not_syn(self) -> Draft:
        """TCP, and not the bare SYN that opens a connection."""
        self._need_protocol(6)
        flags = k.payload(k.TRANSPORT, 13, 1) + k.masked(b"\x17")
        return self._add("tcp flags & (fin | syn | rst | ack) != syn", flags, k.compare(b"\2", k.NEQ))

    def icmp(self, version: int, kind: int, code: int | None = None, negate: bool = False) -> Draft:
        self.family(version).protocol(_ICMP[version])
        word = "icmp" if version == 4 else "icmpv6"
        head = f"{word} type"
        equal, sign = (k.NEQ, "!= ") if negate else (k.EQ, "")
        if code is None:
            return self._add(f"{head} {sign}{kind}", k.payload(k.TRANSPORT, 0, 1), k.compare(bytes([kind]), equal))
        if not negate:
            both = k.payload(k.TRANSPORT, 0, 2), k.compare(bytes([kind, code]))
            return self._add(f"{head} {kind} {word} code {code}", *both)
        key_type = 14 << 6 | 32 if version == 4 else 29 << 6 | 33
        pair = Anonymous(key_type, 8, (k.element(bytes([kind, 0, 0, 0, code, 0, 0, 0])),), NONE, negate=True)
        load = k.payload(k.TRANSPORT, 0, 1) + k.payload(k.TRANSPORT, 1, 1, 9)
        return self._add(f"{head} . {word} code != {{ {kind} . {code} }}", load, pair)

    def icmp6_types(self, kinds: Sequence[int]) -> Draft:
        """More than one."""
        self._need_version(6)
        self._need_protocol(_ICMP[6])
        elements = tuple(k.element(bytes([n])) for n in sorted(kinds))
        words = ", ".join(map(str, sorted(kinds)))
        return self._add(f"icmpv6 type {{ {words} }}", k.payload(k.TRANSPORT, 0, 1), Anonymous(29, 1, elements))

    def hop_limit(self, limit: int) -> Draft:
        self._need_version(6)
        return self._add(f"ip6 hoplimit {limit}", k.payload(k.NETWORK, 7, 1), k.compare(bytes([limit])))

    def in_set(self, version: int, source: bool, name: str, negate: bool = False) -> Draft:
        self._need_version(version)
        sign = "!= " if negate else ""
        return self._add(
            f"{_field(version, source)} {sign}@{name}", _address(version, source), k.lookup(name, negate)
        )

    def in_prefix(self, source: bool, prefix: Prefix, negate: bool = False) -> Draft:
        version = prefix.version
        self._need_version(version)
        width, length = len(prefix.network), prefix.length
        equal, sign = (k.NEQ, "!= ") if negate else (k.EQ, "")
        shown = format_address(prefix.network) if length == 8 * width else str(prefix)
        words = f"{_field(version, source)} {sign}{shown}"
        if length and length % 8 == 0:
            kept = length // 8
            return self._add(words, _address(version, source, kept), k.compare(prefix.network[:kept], equal))
        mask = ((1 << 8 * width) - (1 << 8 * width - length)).to_bytes(width, "big")
        return self._add(words, _address(version, source), k.masked(mask), k.compare(prefix.network, equal))

    def in_intervals(self, version: int, source: bool, intervals: Sequence[Interval], negate: bool = False) -> Draft:
        """Disjoint, sorted, not adjacent."""
        self._need_version(version)
        self._add("", _address(version, source))
        width, key_type = (4, 7) if version == 4 else (16, 8)
        return self._among(_field(version, source), intervals, (width, key_type), negate)

    def _among(self, field: str, intervals: Sequence[Interval], key: tuple[int, int], negate: bool) -> Draft:
        width, key_type = key
        sign = "!= " if negate else ""
        first, last = (n.to_bytes(width, "big") for n in intervals[0])
        if len(intervals) > 1:
            words = ", ".join(_show(i, width) for i in intervals)
            if all(a == b for a, b in intervals):
                elements = tuple(k.element(a.to_bytes(width, "big")) for a, _ in intervals)
                return self._add(f"{field} {sign}{{ {words} }}", Anonymous(key_type, width, elements, negate=negate))
            elements = tuple(interval_elements(intervals, width))
            return self._add(
                f"{field} {sign}{{ {words} }}", Anonymous(key_type, width, elements, interval=True, negate=negate)
            )
        words = f"{field} {sign}{_show(intervals[0], width)}"
        if first == last:
            return self._add(words, k.compare(first, k.NEQ if negate else k.EQ))
        if negate:
            return self._add(words, k.outside(first, last))
        return self._add(words, k.compare(first, k.GTE), k.compare(last, k.LTE))

    def interface_name(self, incoming: bool, name: str) -> Draft:
        if not _INTERFACE.fullmatch(name):
            raise ValueError(f"{name[:40]!r} is no interface name that a rule can hold")
        key, word = (k.IIFNAME, "iifname") if incoming else (k.OIFNAME, "oifname")
        return self._add(f'{word} "{name}"', k.meta(key), k.compare(name.encode().ljust(16, b"\0")))

    # -- what is done besides

    def count(self) -> Draft:
        return self._add("counter", k.counter())

    def log(self, tag: str, group: int) -> Draft:
        if not _TAG.fullmatch(tag):
            raise ValueError(f"{tag[:40]!r} is no log tag: 1 to 28 of A-Z a-z 0-9 . : -")
        rate, burst = LOG_RATE
        words = f'limit rate {rate}/second burst {burst} packets log prefix "{tag}" group {group}'
        return self._add(words, k.limit(rate, burst), k.log(tag, group))

    # -- the skeleton's own matches

    def name(self, incoming: bool, prefix: str) -> Draft:
        key, word = (k.IIFNAME, "iifname") if incoming else (k.OIFNAME, "oifname")
        return self._add(f'{word} "{prefix}*"', k.meta(key), k.compare(prefix.encode()))

    def interface(self, incoming: bool, name: str) -> Draft:
        key, word = (k.IIF, "iif") if incoming else (k.OIF, "oif")
        return self._add(f"{word} @{name}", k.meta(key), k.lookup(name))

    def group(self, incoming: bool, base: int, mask: int) -> Draft:
        key, word = (k.IIFGROUP, "iifgroup") if incoming else (k.OIFGROUP, "oifgroup")
        load = k.meta(key) + k.masked(host(mask))
        return self._add(f"{word} & {mask:#x} == {base:#x}", load, k.compare(host(base)))

    def loopback(self, incoming: bool) -> Draft:
        key, word = (k.IIF, "iif") if incoming else (k.OIF, "oif")
        return self._add(f'{word} "lo"', k.meta(key), k.compare(host(1)))

    def bridge(self, incoming: bool) -> Draft:
        key, word = (k.IIFKIND, "iifkind") if incoming else (k.OIFKIND, "oifkind")
        return self._add(f'meta {word} "bridge"', k.meta(key), k.compare(b"bridge".ljust(16, b"\0")))

    def guest_source(self, version: int, name: str, negate: bool = False, interval: bool = False) -> Draft:
        """iif . source address . source MAC is in the set."""
        self._need_version(version)
        self._need_ether()
        load = k.meta(k.IIF) + (k.to_network_order() if interval else b"")
        load += _address(version, True, register=9) + k.payload(k.LINK, 6, 6, 10 if version == 4 else 13)
        sign = "!= " if negate else ""
        return self._add(f"iif . {IP[version]} saddr . ether saddr {sign}@{name}", load, k.lookup(name, negate))

    def guest_flow(self, version: int, end: str, name: str, interval: bool = False) -> Draft:
        """iif . an end of the flow that this packet is about . source MAC is in the set. `end`: who began it, or who
        answers it, both by their own addresses, whatever is translated in between."""
        self._need_ether()
        load = k.meta(k.IIF) + (k.to_network_order() if interval else b"")
        load += k.flow_source(version, end == "reply", 9) + k.payload(k.LINK, 6, 6, 10 if version == 4 else 13)
        return self._add(f"iif . ct {end} {IP[version]} saddr . ether saddr @{name}", load, k.lookup(name))

    def guest_mac(self, name: str) -> Draft:
        self._need_ether()
        load = k.meta(k.IIF) + k.payload(k.LINK, 6, 6, 9)
        return self._add(f"iif . ether saddr @{name}", load, k.lookup(name))

    def arp_sender(self, name: str, interval: bool = False) -> Draft:
        self._need_ether()
        load = k.meta(k.IIF) + (k.to_network_order() if interval else b"")
        load += k.payload(k.NETWORK, 14, 4, 9) + k.payload(k.LINK, 6, 6, 10) + k.payload(k.NETWORK, 8, 6, 12)
        return self._add(f"iif . arp saddr ip . ether saddr . arp saddr ether @{name}", load, k.lookup(name))

    def arp_question_or_answer(self) -> Draft:
        elements = (k.element(b"\0\1"), k.element(b"\0\2"))
        return self._add("arp operation { 1, 2 }", k.payload(k.NETWORK, 6, 2), Anonymous(11, 2, elements))

    def ct(self, *states: str) -> Draft:
        mask = host(sum(_CT[s] for s in states))
        return self._add(
            f"ct state {','.join(states)}", k.ct_state(), k.masked(mask), k.compare(bytes(4), k.NEQ)
        )

    def too_many_connections(self, name: str, limit: int) -> Draft:
        words = f"add @{name} {{ iif ct count over {limit} }}"
        return self._add(words, k.meta(k.IIF), k.count_connections(name, limit))

    def too_often(self, name: str, rate: int, burst: int) -> Draft:
        """Per second and interface."""
        words = f"add @{name} {{ iif limit rate over {rate}/second burst {burst} packets }}"
        return self._add(words, k.meta(k.IIF), k.limit_rate(name, rate, burst))

    # -- verdicts

    def classes(self, incoming: bool, name: str) -> Draft:
        key, word = (k.IIFGROUP, "iifgroup") if incoming else (k.OIFGROUP, "oifgroup")
        return self._add(f"{word} vmap @{name}", k.meta(key), k.verdict_map(name))

    def accept(self) -> Draft:
        return self._add("accept", k.verdict(k.ACCEPT))

    def drop(self) -> Draft:
        return self._add("drop", k.verdict(k.DROP))

    def give_back(self) -> Draft:
        return self._add("return", k.verdict(k.RETURN))

    def go_on(self) -> Draft:
        return self._add("continue", k.verdict(k.CONTINUE))

    def jump(self, chain: str) -> Draft:
        return self._add(f"jump {chain}", k.verdict(k.JUMP, chain))

    def goto(self, chain: str) -> Draft:
        return self._add(f"goto {chain}", k.verdict(k.GOTO, chain))


def _field(version: int, source: bool) -> str:
    return f"{IP[version]} {'saddr' if source else 'daddr'}"


def _address(version: int, source: bool, length: int = 0, register: int = 1) -> bytes:
    offset = (SADDR if source else DADDR)[version]
    return k.payload(k.NETWORK, offset, length or (4 if version == 4 else 16), register)


def _show(interval: Interval, width: int) -> str:
    """A port, an address, a prefix or a range, as nft lists it."""
    first, last = interval
    if width == 2:
        return str(first) if first == last else f"{first}-{last}"
    low: Address = first.to_bytes(width, "big")
    size = last - first + 1
    if size & (size - 1) == 0 and first % size == 0:
        length = 8 * width - (size.bit_length() - 1)
        return format_address(low) if size == 1 else f"{format_address(low)}/{length}"
    return f"{format_address(low)}-{format_address(last.to_bytes(width, 'big'))}"
