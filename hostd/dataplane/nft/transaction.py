# Owns: one atomic change of our tables: operations in order, each with the caller's label, one send, all or nothing.
# Writes through the socket it is given. An endpoint of a known class is nothing but plain set elements here.
from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from slash32.errors import Slash32Error

from ...compiler.ruleset import HOST_CHAINS, Rule, SetKind, SetSpec
from ..netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NetlinkSocket,
    Refusal,
    attr,
    be32,
    nest,
    text,
)
from . import elements
from . import kernel as k
from .admission import Admission, Element
from .rules import statement
from .shapes import EXEMPT, FROM, IP4, IP6, RESERVED_SETS, TABLE, TO, Base, SetShape
from .skeleton import ALWAYS, RESERVED_CHAINS
from .statements import Anonymous, Statement, host

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]*-[A-Za-z0-9_.-]+")
_BEGIN = struct.pack("=IHHIIBBH", 20, k.BATCH_BEGIN, 1, 0, 0, 0, 0, int.from_bytes(b"\0\x0a", "little"))
_END = struct.pack("=IHHIIBBH", 20, k.BATCH_END, 1, 0, 0, 0, 0, int.from_bytes(b"\0\x0a", "little"))
NOTHING = _BEGIN + _END  # an empty batch
MUCH = 1 << 14  # bytes: a thousand elements
_FIELD = {SetKind.ADDR4: IP4, SetKind.NET4: IP4, SetKind.ADDR6: IP6, SetKind.NET6: IP6}
_RULE_DIGEST = 0x73  # our own kind in a rule's user data; nft skips kinds that it does not know
_SET_SIZE = 0x73
_WORDS = {
    errno.ENOENT: "no such object, or it names one that does not exist",
    errno.EEXIST: "it is there already, with other content, or it overlaps",
    errno.EBUSY: "it is still in use",
    errno.ENFILE: "the set is full",
    errno.EPERM: "not permitted: the table has another owner, or CAP_NET_ADMIN is missing",
    errno.EMLINK: "jumps too deep or in a circle",
    errno.ELOOP: "jumps in a circle",
}


Exchange = Callable[[bytes, int], list[Refusal]]  # NetlinkSocket.exchange


class TransactionRefused(Slash32Error):
    """The kernel refused; nothing was applied. `label` is the caller's for the operation, None where it named none."""

    def __init__(self, label: Hashable, refusal: Refusal, operation: str) -> None:
        self.label = label
        self.errno = refusal.errno
        self.message = f"{operation}: {refusal.message or _WORDS.get(refusal.errno) or refusal}"
        super().__init__(f"the kernel refused {self.message}")


class _Origin(NamedTuple):
    label: Hashable
    operation: str


def shape_of(spec: SetSpec) -> SetShape:
    """An interval set has no size in the kernel: what it counts differs between kernels."""
    net = spec.kind in elements.NETS
    return SetShape((_FIELD[spec.kind],), 0 if net else spec.size, interval=net)


class Transaction:
    """Operations are applied in order, all at once, by commit(). May be committed once."""

    def __init__(self, socket: NetlinkSocket, table: str = TABLE, unheard: Exchange | None = None) -> None:
        """`unheard` exchanges what is very much."""
        self._exchange, self._unheard = socket.exchange, unheard
        self._table = text(1, table)
        self._messages: list[bytes] = []
        self._origins: list[_Origin] = []
        self._origin = _Origin(None, "")
        self._seq = socket.reserve(1 << 16)
        self._anonymous = 0
        self._much = False

    def __len__(self) -> int:
        """Messages so far; 0: commit() would write nothing and does not."""
        return len(self._messages)

    # -- sets

    def add_set(self, name: str, spec: SetSpec, label: Hashable) -> None:
        _free(name, RESERVED_SETS)
        self._origin = _Origin(label, f"add set {name}")
        self.declare_set(k.INET, name, shape_of(spec), spec.size)

    def delete_set(self, name: str, label: Hashable) -> None:
        _free(name, RESERVED_SETS)
        self._origin = _Origin(label, f"delete set {name}")
        self.message(k.DELSET, k.INET, text(2, name))

    def flush_set(self, name: str, label: Hashable) -> None:
        """Take all members away."""
        _free(name, RESERVED_SETS)
        self._origin = _Origin(label, f"flush set {name}")
        self._much = True  # maybe
        self.message(k.DELSETELEM, k.INET, text(2, name))

    def add_members(self, name: str, kind: SetKind, members: Iterable[elements.Member], label: Hashable) -> None:
        """Members of a NET set are disjoint, also from those that stay in it: see `disjoint`; delete before adding.

        Raises ValueError for a member that does not fit the kind.
        """
        self._origin = _Origin(label, f"add members to set {name}")
        self._members(k.NEWSETELEM, name, elements.encode(kind, members))

    def delete_members(self, name: str, kind: SetKind, members: Iterable[elements.Member], label: Hashable) -> None:
        self._origin = _Origin(label, f"delete members of set {name}")
        self._members(k.DELSETELEM, name, elements.encode(kind, members))

    def _members(self, kind: int, name: str, pieces: Iterable[bytes]) -> None:
        head = text(2, name)
        for piece in pieces:
            self.message(kind, k.INET, head + nest(3, piece))

    # -- chains and classes

    def put_chain(self, name: str, rules: Sequence[Rule], label: Hashable) -> None:
        """Create the chain, or replace its rules. What it jumps to and the sets it asks exist, or come earlier."""
        _free(name, RESERVED_CHAINS)
        self._origin = _Origin(label, f"write chain {name}")
        self.write_chain(k.INET, name, [statement(r) for r in rules])

    def delete_chain(self, name: str, label: Hashable) -> None:
        """Its last user is deleted earlier. One of HOST_CHAINS is emptied: the skeleton needs it."""
        _free(name, RESERVED_CHAINS)
        self._origin = _Origin(label, f"delete chain {name}")
        if name in HOST_CHAINS:
            self.flush_chain(k.INET, name)
        else:
            self.remove_chain(k.INET, name)

    def put_class(self, group: int, from_chain: str, to_chain: str, label: Hashable) -> None:
        """A group that has another class already is refused (EBUSY or EEXIST): delete that first, here."""
        self._origin = _Origin(label, f"class {group:#x}")
        for name, chain in ((FROM, from_chain), (TO, to_chain)):
            self.message(k.NEWSETELEM, k.INET, text(2, name) + nest(3, k.verdict_element(host(group), chain)))

    def delete_class(self, group: int, label: Hashable) -> None:
        self._origin = _Origin(label, f"delete class {group:#x}")
        for name in (FROM, TO):
            self.message(k.DELSETELEM, k.INET, text(2, name) + nest(3, k.element(host(group))))

    # -- endpoints

    def admit(self, admission: Admission, label: Hashable) -> None:
        """Idempotent."""
        self._origin = _Origin(label, "admit endpoint")
        self._elements(k.NEWSETELEM, admission.elements())

    def expel(self, admission: Admission, label: Hashable) -> None:
        """Takes the guest's MAC away too: to drop one of several addresses, expel all and admit what stays, here."""
        self._origin = _Origin(label, "expel endpoint")
        self._elements(k.DELSETELEM, admission.elements())

    def exempt(self, ifindex: int, on: bool, label: Hashable) -> None:
        """The guard lets this interface be, whatever its name."""
        self._origin = _Origin(label, "exempt interface")
        kind = k.NEWSETELEM if on else k.DELSETELEM
        self._elements(kind, [Element(family, EXEMPT, host(ifindex)) for family in (k.INET, k.ARP)])

    def sweep(self, strays: Iterable[Element], label: Hashable) -> None:
        """Delete elements that read() found to belong to no whole admission."""
        self._origin = _Origin(label, "sweep stray elements")
        self._elements(k.DELSETELEM, strays)

    def _elements(self, kind: int, items: Iterable[Element]) -> None:
        for item in items:
            encoded = k.range_element(item.key, item.last) if item.last else k.element(item.key)
            self.message(kind, item.family, text(2, item.set) + nest(3, encoded))

    # -- what the skeleton and the above are made of

    def table(self, family: int, flags: int = 0) -> None:
        self._origin = _Origin(None, "add the table")
        self.message(0, family, be32(2, flags))

    def remove_table(self, family: int) -> None:
        self.message(k.DELTABLE, family, b"")

    def declare_set(self, family: int, name: str, shape: SetShape, size: int = 0) -> None:
        body = [text(2, name), be32(3, shape.flags), be32(4, shape.key_type), be32(5, shape.key_length)]
        if shape.verdicts:
            body += [be32(6, k.VERDICT_TYPE), be32(7, 16)]
        description = be32(1, shape.size) if shape.size else b""
        if shape.interval and len(shape.fields) > 1:
            description += nest(2, *(nest(1, be32(1, f.length)) for f in shape.fields))
        note = bytes([0, 4]) + host(shape.order) + (bytes([_SET_SIZE, 4]) + host(size) if size else b"")
        body += [nest(9, description), be32(10, self._identity()), attr(13, note)]
        self.message(k.NEWSET, family, b"".join(body))

    def remove_set(self, family: int, name: str) -> None:
        self.message(k.DELSET, family, text(2, name))

    def add_chain(self, family: int, name: str, base: Base | None = None) -> None:
        """What is in it stays, if it is there."""
        hook = b""
        if base:
            hook = nest(4, be32(1, base.number), be32(2, base.priority)) + be32(5, 1) + text(7, "filter")
        self.message(k.NEWCHAIN, family, text(3, name) + hook)

    def write_chain(self, family: int, name: str, rules: Iterable[Statement], base: Base | None = None) -> None:
        self.add_chain(family, name, base)
        self.flush_chain(family, name)
        for rule in rules:
            self._rule(family, name, rule)

    def flush_chain(self, family: int, name: str) -> None:
        self.message(k.DELRULE, family, text(2, name))

    def remove_chain(self, family: int, name: str) -> None:
        self.flush_chain(family, name)
        self.message(k.DELCHAIN, family, text(3, name))

    def _rule(self, family: int, chain: str, rule: Statement) -> None:
        code = b"".join(c if isinstance(c, bytes) else self._constant_set(family, c) for c in rule.code)
        note = bytes([_RULE_DIGEST, len(rule.digest)]) + rule.digest
        if rule.comment:
            note = bytes([0, len(rule.comment) + 1]) + rule.comment.encode() + b"\0" + note
        self.message(k.NEWRULE, family, text(2, chain) + nest(4, code) + attr(7, note))

    def _constant_set(self, family: int, item: Anonymous) -> bytes:
        """Declares it and returns the lookup."""
        name, identity = "__set%d", self._identity()
        flags = k.SET_ANONYMOUS | k.SET_CONSTANT | (k.SET_INTERVAL if item.interval else 0)
        head = [text(2, name), be32(3, flags), be32(4, item.key_type), be32(5, item.key_length)]
        size = nest(9, be32(1, len(item.elements)))
        note = attr(13, b"\0\4" + host(item.order))
        self.message(k.NEWSET, family, b"".join([*head, size, be32(10, identity), note]))
        for piece in _pieces(item.elements):
            self.message(k.NEWSETELEM, family, text(2, name) + be32(4, identity) + nest(3, piece))
        return k.lookup(name, item.negate, identity)

    def _identity(self) -> int:
        self._anonymous += 1
        return self._anonymous

    def message(self, kind: int, family: int, body: bytes) -> None:
        flags = 1
        if kind in (k.NEWTABLE, k.NEWCHAIN, k.NEWRULE, k.NEWSET, k.NEWSETELEM):
            flags |= NLM_F_CREATE | (NLM_F_APPEND if kind == k.NEWRULE else 0)
        length, seq = 20 + len(self._table) + len(body), self._seq + len(self._messages)
        header = k.HEADER.pack(length, k.SUBSYSTEM | kind, flags, seq, 0, family, 0, 0)
        self._messages.append(header + self._table + body)
        self._origins.append(self._origin)

    # -- the end

    def commit(self) -> None:
        """Raises TransactionRefused (nothing was applied), or OSError where the outcome is unknown."""
        if not self._messages:
            return
        exchange: Exchange = self._exchange
        if self._unheard is not None and (self._much or sum(map(len, self._messages)) >= MUCH):
            exchange = self._unheard
            self.message(k.NEWCHAIN, k.INET, text(3, ALWAYS))  # so that it counts, should all be there
        last = bytearray(self._messages[-1])
        struct.pack_into("=H", last, 6, struct.unpack_from("=H", last, 6)[0] | NLM_F_ACK)
        self._messages[-1] = bytes(last)
        batch = b"".join([_BEGIN, *self._messages, _END])
        refused = exchange(batch, self._seq + len(self._messages) - 1)
        if not refused:
            return
        index = refused[0].seq - self._seq
        origin = self._origins[index] if 0 <= index < len(self._origins) else _Origin(None, "a change of its tables")
        raise TransactionRefused(origin.label, refused[0], origin.operation)


def _pieces(items: Sequence[bytes]) -> Iterable[bytes]:
    """Joined into as few as a message's 16-bit length allows."""
    piece: list[bytes] = []
    size = 0
    for item in items:
        if size + len(item) > 65000:
            yield b"".join(piece)
            piece, size = [], 0
        piece.append(item)
        size += len(item)
    yield b"".join(piece)


def _free(name: str, reserved: frozenset[str]) -> None:
    """A word of nft's grammar as a name (`all`) would load here, and make every later listing fail to load."""
    if name in reserved:
        raise ValueError(f"{name} is the skeleton's own name: choose another for a chain or set of a policy")
    if len(name) > 120 or not _NAME.fullmatch(name):
        raise ValueError(f"{name[:200]!r} is no name for a chain or set: write it like pi-web")
