# Owns: nf_tables as the kernel spells it: messages, attributes, expressions, as bytes. No policy, no text, no I/O.
# Numbers are those of <linux/netfilter/nf_tables.h>. Registers: 1 is the first of 16 bytes, 9 to 15 its words.
from __future__ import annotations

import struct

from ..netlink import attr, be16, be32, be64, nest, text, u8

INET = 1
ARP = 3

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2
NEWCHAIN, GETCHAIN, DELCHAIN = 3, 4, 5
NEWRULE, GETRULE, DELRULE = 6, 7, 8
NEWSET, GETSET, DELSET = 9, 10, 11
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
GETGEN = 16
SUBSYSTEM = 10 << 8
BATCH_BEGIN, BATCH_END = 0x10, 0x11
NOTIFY_GROUP = 7

TABLE_DORMANT = 0x1
TABLE_OWNER = 0x2
TABLE_PERSIST = 0x4

SET_ANONYMOUS = 0x1
SET_CONSTANT = 0x2
SET_INTERVAL = 0x4
SET_MAP = 0x8
SET_EVAL = 0x20
SET_CONCAT = 0x80
ELEM_INTERVAL_END = 0x1
VERDICT_TYPE = 0xFFFFFF00

# meta keys
LEN, IIF, OIF, IIFNAME, OIFNAME, IIFTYPE, NFPROTO, L4PROTO = 0, 4, 5, 6, 7, 8, 15, 16
IIFGROUP, OIFGROUP, IIFKIND, OIFKIND = 21, 22, 26, 27
CT_SRC_IP, CT_SRC_IP6 = 19, 21
# payload bases
LINK, NETWORK, TRANSPORT = 0, 1, 2
# comparisons
EQ, NEQ, LTE, GTE = 0, 1, 3, 5
# verdicts
DROP, ACCEPT, CONTINUE, JUMP, GOTO, RETURN = 0, 1, -1, -3, -4, -5

HEADER = struct.Struct("=IHHIIBBH")


def nfgen(family: int, resource: int = 0) -> bytes:
    return struct.pack(">BBH", family, 0, resource)


def expression(name: str, *parts: bytes) -> bytes:
    return nest(1, text(1, name), nest(2, *parts))


def _value(kind: int, data: bytes) -> bytes:
    return nest(kind, attr(1, data))


def meta(key: int, register: int = 1) -> bytes:
    return expression("meta", be32(2, key), be32(1, register))


def compare(data: bytes, operator: int = EQ) -> bytes:
    return expression("cmp", be32(1, 1), be32(2, operator), _value(3, data))


def outside(first: bytes, last: bytes) -> bytes:
    return expression("range", be32(1, 1), be32(2, NEQ), _value(3, first), _value(4, last))


def payload(base: int, offset: int, length: int, register: int = 1) -> bytes:
    return expression("payload", be32(1, register), be32(2, base), be32(3, offset), be32(4, length))


def masked(mask: bytes) -> bytes:
    return expression(
        "bitwise", be32(1, 1), be32(2, 1), be32(3, len(mask)), _value(4, mask), _value(5, bytes(len(mask)))
    )


def to_network_order() -> bytes:
    return expression("byteorder", be32(1, 1), be32(2, 1), be32(3, 1), be32(4, 4), be32(5, 4))


def ct_state() -> bytes:
    return expression("ct", be32(1, 1), be32(2, 0))


def flow_source(version: int, reply: bool, register: int) -> bytes:
    """The source address of a flow's first packet, or of the first answer to it."""
    key = CT_SRC_IP if version == 4 else CT_SRC_IP6
    return expression("ct", be32(1, register), be32(2, key), u8(3, reply))


def lookup(name: str, negate: bool = False, identity: int = 0) -> bytes:
    """`identity` names an anonymous set within its transaction."""
    parts = [text(1, name), be32(2, 1)]
    if identity:
        parts.append(be32(4, identity))
    if negate:
        parts.append(be32(5, 1))
    return expression("lookup", *parts)


def verdict_map(name: str) -> bytes:
    return expression("lookup", text(1, name), be32(2, 1), be32(3, 0))


def count_connections(name: str, limit: int) -> bytes:
    """True for a key that has more than `limit` conntrack entries; adds the key to the dynamic set `name`."""
    over = nest(7, text(1, "connlimit"), nest(2, be32(1, limit), be32(2, 1)))
    return expression("dynset", text(1, name), be32(3, 0), be32(4, 1), over)


def limit_rate(name: str, rate: int, burst: int) -> bytes:
    """True for a key that comes more than `rate` times a second; adds the key to the dynamic set `name`."""
    over = nest(7, text(1, "limit"), nest(2, be64(1, rate), be64(2, 1), be32(3, burst), be32(4, 0), be32(5, 1)))
    return expression("dynset", text(1, name), be32(3, 0), be32(4, 1), over)


def counter() -> bytes:
    """Begins at nothing: rules that differ in what they counted have one fingerprint."""
    return expression("counter", be64(1, 0), be64(2, 0))


def limit(rate: int, burst: int) -> bytes:
    """Packets, a second and at once; what is more fails to match."""
    return expression("limit", be64(1, rate), be64(2, 1), be32(3, burst), be32(4, 0), be32(5, 0))


def log(prefix: str, group: int) -> bytes:
    return expression("log", be16(1, group), text(2, prefix))


def verdict_data(code: int, chain: str = "") -> bytes:
    parts = [be32(1, code)]
    if chain:
        parts.append(text(2, chain))
    return nest(2, nest(2, *parts))


def verdict(code: int, chain: str = "") -> bytes:
    return expression("immediate", be32(1, 0), verdict_data(code, chain))


def element(key: bytes) -> bytes:
    return nest(1, nest(1, attr(1, key)))


def interval_end(key: bytes) -> bytes:
    return nest(1, nest(1, attr(1, key)), be32(3, ELEM_INTERVAL_END))


def range_element(first: bytes, last: bytes) -> bytes:
    """Of a set of concatenations with intervals; both ends inclusive."""
    return nest(1, nest(1, attr(1, first)), nest(10, attr(1, last)))


def verdict_element(key: bytes, chain: str) -> bytes:
    return nest(1, nest(1, attr(1, key)), verdict_data(JUMP, chain))
