# Owns: what a logged packet becomes: a line for people and fields for programs, and how many of them a second are
# written. Pure. The packet is a guest's: its bytes are what they are.
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from slash32.net import Address, format_address

from ..compiler.desired import LogPoint

IDENTIFIER = "slash32-hostd"
A_SECOND = 100  # entries that are written, of all rules together

Fields = dict[str, str]

_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "icmpv6", 132: "sctp", 136: "udplite"}
_WITH_PORTS = (6, 17, 33, 132, 136)
_ICMP = (1, 58)
_FRAGMENT, _AUTH = 44, 51
_EXTENSIONS = (0, 43, _FRAGMENT, _AUTH, 60, 135)
_MOST_EXTENSIONS = 8


class Logged(NamedTuple):
    """As the kernel tells it."""

    tag: str  # of the rule
    indev: int  # ifindex; 0: none
    outdev: int
    mac: bytes  # of the sender on the last link, or b""
    payload: bytes  # its first bytes, from the network header on


class Header(NamedTuple):
    source: Address
    destination: Address
    protocol: int
    source_port: int | None = None
    port: int | None = None
    icmp: tuple[int, int] | None = None  # type, code


def header(payload: bytes) -> Header | None:
    """None: not even whole addresses. What is cut off or malformed behind them is left out."""
    version = payload[0] >> 4 if payload else 0
    if version == 4 and len(payload) >= 20:
        offset, protocol = 4 * (payload[0] & 15), payload[9]
        rest = payload[offset:] if offset >= 20 and not int.from_bytes(payload[6:8], "big") & 0x1FFF else b""
        return _with_rest(payload[12:16], payload[16:20], protocol, rest)
    if version == 6 and len(payload) >= 40:
        return _with_rest(payload[8:24], payload[24:40], *_behind_extensions(payload[6], payload[40:]))
    return None


def _behind_extensions(kind: int, rest: bytes) -> tuple[int, bytes]:
    for _ in range(_MOST_EXTENSIONS):
        if kind not in _EXTENSIONS or len(rest) < 8:
            break
        if kind == _FRAGMENT:
            first, length = not int.from_bytes(rest[2:4], "big") & 0xFFF8, 8
        else:
            first, length = True, 4 * (rest[1] + 2) if kind == _AUTH else 8 * (rest[1] + 1)
        kind, rest = rest[0], rest[length:]
        if not first:
            return kind, b""
    return kind, rest


def _with_rest(source: bytes, destination: bytes, protocol: int, rest: bytes) -> Header:
    found = Header(source, destination, protocol)
    if protocol in _WITH_PORTS and len(rest) >= 4:
        return found._replace(source_port=int.from_bytes(rest[:2], "big"), port=int.from_bytes(rest[2:4], "big"))
    if protocol in _ICMP and len(rest) >= 2:
        return found._replace(icmp=(rest[0], rest[1]))
    return found


def entry(logged: Logged, point: LogPoint | None, who: str) -> Fields:
    """For the journal. `point`: what the tag stands for, None where no rule has it any more; `who`: the endpoint."""
    found = header(logged.payload)
    fields = {"PRIORITY": "6", "SYSLOG_IDENTIFIER": IDENTIFIER, "SLASH32_ENDPOINT": _plain(who)}
    if point is None:
        what = f"rule {_plain(logged.tag)}, which is gone"
    else:
        way = point.direction.value.lower()
        tier = f" (tier {point.tier})" if point.tier else ""
        what = f"{point.kind} {point.name} {way}[{point.rule}]{tier}"
        fields |= {f"SLASH32_{point.kind.upper()}": point.name, "SLASH32_RULE": str(point.rule)}
        fields |= {"SLASH32_DIRECTION": way} | ({"SLASH32_TIER": point.tier} if point.tier else {})
    if logged.mac:
        fields["SLASH32_MAC"] = logged.mac.hex(":")
    fields |= _of_header(found) if found else {}
    return {"MESSAGE": f"{_plain(who)}: {what}: {_words(found)}", **fields}


def _of_header(found: Header) -> Fields:
    fields = {
        "SLASH32_SOURCE": format_address(found.source),
        "SLASH32_DESTINATION": format_address(found.destination),
        "SLASH32_PROTOCOL": _protocol(found.protocol),
    }
    if found.port is not None:
        fields |= {"SLASH32_SOURCE_PORT": str(found.source_port), "SLASH32_PORT": str(found.port)}
    if found.icmp is not None:
        fields["SLASH32_ICMP"] = f"{found.icmp[0]}/{found.icmp[1]}"
    return fields


def _words(found: Header | None) -> str:
    if found is None:
        return "a packet without whole addresses"
    ends = _end(found.source, found.source_port), _end(found.destination, found.port)
    kind = f" {found.icmp[0]}/{found.icmp[1]}" if found.icmp is not None else ""
    return f"{ends[0]} -> {ends[1]} {_protocol(found.protocol)}{kind}"


def _protocol(number: int) -> str:
    return _NAMES.get(number, str(number))


def _end(address: Address, port: int | None) -> str:
    shown = format_address(address)
    if port is None:
        return shown
    return f"[{shown}]:{port}" if len(address) == 16 else f"{shown}:{port}"


def _plain(text: str) -> str:
    """One bounded line, whatever somebody named his guest."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


class PacketLog:
    """Writes at most A_SECOND entries a second, and then says how many it did not write."""

    def __init__(self, write: Callable[[Fields], bool], who: Callable[[Logged, LogPoint | None], str]) -> None:
        """`write` says whether it could; `who` names the endpoint that a packet was logged for."""
        self._write = write
        self._who = who
        self._since = float("-inf")
        self._written = 0
        self._missed = 0
        self.told = self.untold = 0  # in all

    def heard(self, entries: Iterable[Logged], points: Mapping[str, LogPoint], now: float) -> None:
        self.tick(now)
        for each in entries:
            if self._written >= A_SECOND:
                self.lost(1)
                continue
            self._written += 1
            point = points.get(each.tag)
            if self._write(entry(each, point, self._who(each, point))):
                self.told += 1
            else:
                self.lost(1)

    def lost(self, count: int) -> None:
        """On the way here, or from here."""
        self._missed += count
        self.untold += count

    def tick(self, now: float) -> None:
        if now - self._since < 1.0:
            return
        self._since, self._written = now, 0
        if self._missed:
            words = f"{self._missed} more logged packets not written"
            if self._write({"MESSAGE": words, "PRIORITY": "5", "SYSLOG_IDENTIFIER": IDENTIFIER}):
                self._missed = 0
