# Owns: the tables of iptables-legacy as the kernel hands them out (getsockopt), taken apart: chains, and of each rule
# its comment, verdict and the sets it asks. May touch: raw sockets it makes for asking. Writes nothing.
from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

_INFO, _ENTRIES = 64, 65
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_HEAD = {4: (88, 112, 82, 2), 6: (140, 168, 131, 4)}  # offsets of target_offset, of matches, of flags; goto's flag
_ATTEMPTS = 20
_SO_IP_SET, _GET_BYINDEX = 83, 7
_VERDICTS = {-1: "DROP", -2: "ACCEPT", -5: "RETURN"}
_libc = ctypes.CDLL(None, use_errno=True)


class Info(NamedTuple):
    """Cheap to ask; differs after most changes."""

    hooks: tuple[int, ...]
    offsets: tuple[int, ...]
    entries: int
    size: int


class Entry(NamedTuple):
    comment: str
    verdict: str  # ACCEPT, DROP, RETURN, "-j CHAIN", "-g CHAIN", an extension's name, or "": on with the next
    sets: tuple[tuple[int, bool], ...]  # (index, inverted)
    packets: int
    size: int  # bytes counted


@dataclass(frozen=True)
class Table:
    chains: dict[str, tuple[Entry, ...]] = field(default_factory=dict)  # the built-in ones too


class _Raw(NamedTuple):
    offset: int
    comment: str
    sets: tuple[tuple[int, bool], ...]
    target: str
    data: bytes
    is_goto: bool
    packets: int
    size: int
    next: int


def info(version: int, table: str) -> Info | None:
    """None: this kernel has no such table."""
    buffer = ctypes.create_string_buffer(table.encode(), 84)
    if not _ask(version, _INFO, buffer):
        return None
    numbers = struct.unpack_from("=13I", buffer.raw, 32)
    return Info(tuple(n for n in range(5) if numbers[0] >> n & 1), numbers[1:6], numbers[11], numbers[12])


def read(version: int, table: str) -> Table | None:
    for _ in range(_ATTEMPTS):
        head = info(version, table)
        if head is None:
            return None
        buffer = ctypes.create_string_buffer(struct.pack("=32sI4x", table.encode(), head.size), 40 + head.size)
        try:
            _ask(version, _ENTRIES, buffer)
        except OSError as error:
            if error.errno == errno.EAGAIN:  # somebody changed it in between
                continue
            raise
        return _chains(version, head, buffer.raw[40:])
    raise OSError(errno.EAGAIN, f"table {table} kept changing through {_ATTEMPTS} attempts to read it")


def _ask(version: int, option: int, buffer: ctypes.Array[ctypes.c_char]) -> bool:
    family, level = (socket.AF_INET, 0) if version == 4 else (socket.AF_INET6, 41)
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 255) as asking:
        length = ctypes.c_uint32(len(buffer))
        if not _libc.getsockopt(asking.fileno(), level, option, buffer, ctypes.byref(length)):
            return True
    code = ctypes.get_errno()
    if code in (errno.ENOENT, errno.ENOPROTOOPT):
        return False
    raise OSError(code, os.strerror(code))


def _chains(version: int, head: Info, blob: bytes) -> Table:
    entries = _walk(version, blob)
    starts = {head.offsets[hook]: _HOOKS[hook] for hook in head.hooks}
    places: dict[int, str] = dict(starts)  # where a chain's first rule stands
    name = ""
    found: dict[str, list[_Raw]] = {}
    for entry in entries:
        if entry.target == "ERROR":
            name = _text(entry.data)
            places[entry.next] = name
        elif entry.offset in starts:
            name = starts[entry.offset]
        if entry.target != "ERROR":
            found.setdefault(name, []).append(entry)
        elif name != "ERROR":
            found[name] = []
    # the last of each chain is its policy, or the return at its end
    return Table({chain: tuple(_entry(e, places) for e in rules[:-1]) for chain, rules in found.items()})


def _walk(version: int, blob: bytes) -> list[_Raw]:
    lengths, matches, flags, goto = _HEAD[version]
    found, offset = [], 0
    while offset + matches <= len(blob):
        target, step = struct.unpack_from("=HH", blob, offset + lengths)
        packets, counted = struct.unpack_from("=QQ", blob, offset + matches - 16)
        comment, sets = "", []
        at, end = offset + matches, offset + target
        while at + 32 <= end:
            size = struct.unpack_from("=H", blob, at)[0]
            kind = blob[at + 2 : at + 31].split(b"\0", 1)[0]
            if kind == b"comment":
                comment = _text(blob[at + 32 : at + size])
            elif kind == b"set":
                index, _, bits = struct.unpack_from("=HBB", blob, at + 32)
                sets.append((index, bool(bits & 1)))
            at += max(size, 32)
        size = struct.unpack_from("=H", blob, end)[0]
        name = _text(blob[end + 2 : end + 31])
        is_goto = bool(blob[offset + flags] & goto)
        found.append(_Raw(offset, comment, tuple(sets), name, blob[end + 32 : end + size], is_goto, packets,
                          counted, offset + step))  # fmt: skip
        if not step:
            break
        offset += step
    return found


def _entry(raw: _Raw, places: dict[int, str]) -> Entry:
    verdict = raw.target
    if not verdict:
        number = struct.unpack_from("=i", raw.data)[0]
        if number < 0:
            verdict = _VERDICTS.get(number, str(number))
        elif number != raw.next:
            verdict = f"{'-g' if raw.is_goto else '-j'} {places.get(number, '?')}"
    return Entry(raw.comment, verdict, raw.sets, raw.packets, raw.size)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode(errors="replace")


def set_names(indexes: set[int]) -> dict[int, str]:
    """Of sets that rules ask by index; those that are gone meanwhile are left out."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 255) as asking:
        for index in indexes:
            buffer = ctypes.create_string_buffer(struct.pack("=IIH30x", _GET_BYINDEX, 7, index), 40)
            length = ctypes.c_uint32(len(buffer))
            if not _libc.getsockopt(asking.fileno(), 0, _SO_IP_SET, buffer, ctypes.byref(length)):
                found[index] = _text(buffer.raw[8:])
    return found
