# Owns: the socket filters (classic BPF) that keep notifications of no interest out of the monitor's buffers: the
# kernel throws them away, at no cost to us however many others cause. Bytes only, no socket.
#
# Words are loaded big-endian, so multi-byte fields in host order are compared byte by byte or swapped.
from __future__ import annotations

import struct
import sys
from typing import NamedTuple

from .rtnl import links, neighbours, routes

_LOAD_WORD = 0x20
_LOAD_BYTE = 0x30
_JUMP_EQUAL = 0x15
_JUMP_SET = 0x45
_RETURN = 0x06
_INSTRUCTION = struct.Struct("=HBBI")

_LOW = 0 if sys.byteorder == "little" else 1  # of a 16-bit field
_TYPE = 4 + _LOW
_FLAGS_HIGH = 6 + 1 - _LOW
_PORT = 12
_FAMILY = 16
_ROUTE_TABLE = 16 + 4
_ROUTE_PROTOCOL = 16 + 5
_NEIGHBOUR_STATE = 16 + 8 + _LOW
_REPLACED = 0x01  # NLM_F_REPLACE, as a bit of the flags' high byte

RTM_NEWNETCONF = 80


class _Step(NamedTuple):
    code: int
    operand: int
    yes: str = ""  # label; "" is the next step
    no: str = ""


def _load(offset: int, word: bool = False) -> _Step:
    return _Step(_LOAD_WORD if word else _LOAD_BYTE, offset)


def _equal(value: int, yes: str = "", no: str = "") -> _Step:
    return _Step(_JUMP_EQUAL, value, yes, no)


def _drop_own(port: int) -> list[_Step]:
    swapped = int.from_bytes(struct.pack("=I", port), "big")
    return [_load(_PORT, word=True), _equal(swapped, "drop")] if port else []


def route_sieve(own_port: int) -> bytes:
    """Links, our routes, whatever replaced a route of the main table, our kind of neighbours, lost addresses, netconf;
    but for the links and netconf nothing that the socket `own_port` caused."""
    return _assemble(
        _load(_TYPE),
        _equal(RTM_NEWNETCONF, "keep"),
        _equal(links.RTM_NEWLINK, "link"),
        _equal(links.RTM_DELLINK, "link"),
        *_drop_own(own_port),
        _load(_TYPE),
        _equal(routes.RTM_NEWROUTE, "route"),
        _equal(routes.RTM_DELROUTE, "protocol"),
        _equal(neighbours.RTM_NEWNEIGH, "neighbour"),
        _equal(neighbours.RTM_DELNEIGH, "keep"),
        _equal(neighbours.RTM_DELADDR, "keep", "drop"),
        "link",
        _load(_FAMILY),  # a port that leaves a bridge is "deleted" too, with the bridge's family
        _equal(0, "keep", "drop"),
        "route",
        _load(_FLAGS_HIGH),
        _Step(_JUMP_SET, _REPLACED, "table"),
        "protocol",
        _load(_ROUTE_PROTOCOL),
        _equal(routes.PROTOCOL, "table", "drop"),
        "table",
        _load(_ROUTE_TABLE),
        _equal(routes.TABLE_MAIN, "keep", "drop"),
        "neighbour",
        _load(_NEIGHBOUR_STATE),
        _equal(neighbours.NUD_PERMANENT, "keep", "drop"),
    )


def ruleset_sieve(own_port: int) -> bytes:
    return _assemble(*_drop_own(own_port), _Step(_RETURN, 0xFFFFFFFF))


def _assemble(*program: _Step | str) -> bytes:
    """A label stands before the step it names; "keep" and "drop" are at the end."""
    steps: list[_Step] = []
    labels: dict[str, int] = {}
    for item in (*program, "keep", _Step(_RETURN, 0xFFFFFFFF), "drop", _Step(_RETURN, 0)):
        if isinstance(item, str):
            labels[item] = len(steps)
        else:
            steps.append(item)
    code = b""
    for here, step in enumerate(steps, 1):
        yes, no = (labels[label] - here if label else 0 for label in (step.yes, step.no))
        code += _INSTRUCTION.pack(step.code, yes, no, step.operand)
    return code
