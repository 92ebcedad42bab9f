# Owns: of what a table of ours is made: sets and chains as nft declares them, and the skeleton's own sets. Data only.
from __future__ import annotations

from typing import NamedTuple

from . import kernel as k
from .statements import BIG, HOST, NONE, Statement

TABLE = "slash32"

_ENDPOINTS = 65536  # elements; the kernel's memory for an empty set of this size is 1 MiB
_CLASSES = 16384
_EXEMPT = 4096
FIRST = -450  # before reassembly (-400), which keys by addresses only, and before conntrack (-200)


class Field(NamedTuple):
    text: str
    datatype: int
    length: int


IFACE = Field("iface_index", 20, 4)
GROUP = Field("devgroup", 35, 4)
MAC = Field("ether_addr", 9, 6)
IP4 = Field("ipv4_addr", 7, 4)
IP6 = Field("ipv6_addr", 8, 16)


class SetShape(NamedTuple):
    """A named set or verdict map as nft declares it."""

    fields: tuple[Field, ...]
    size: int = 0
    interval: bool = False
    dynamic: bool = False
    verdicts: bool = False

    @property
    def key_type(self) -> int:
        kind = 0
        for field in self.fields:
            kind = kind << 6 | field.datatype
        return kind

    @property
    def key_length(self) -> int:
        """Every field of a concatenation is padded to a word; a field alone is not."""
        return sum((f.length + 3) & ~3 for f in self.fields) if len(self.fields) > 1 else self.fields[0].length

    @property
    def order(self) -> int:
        if len(self.fields) > 1:
            return NONE
        return HOST if self.fields[0] in (IFACE, GROUP) else BIG

    @property
    def flags(self) -> int:
        flags = k.SET_MAP * self.verdicts | k.SET_EVAL * self.dynamic | k.SET_INTERVAL * self.interval
        return flags | k.SET_CONCAT * (self.interval and len(self.fields) > 1)

    def __str__(self) -> str:
        words = [f"type {' . '.join(f.text for f in self.fields)}{' : verdict' * self.verdicts};"]
        if self.size:
            words.append(f"size {self.size};")
        if self.interval or self.dynamic:
            words.append(f"flags {'interval' if self.interval else 'dynamic'};")
        return " ".join(words)


class Base(NamedTuple):
    """Where a base chain hangs; its policy is accept."""

    hook: str
    number: int
    priority: int

    def __str__(self) -> str:
        where = f"filter - {-self.priority}" if self.priority > FIRST else str(self.priority)
        return f"type filter hook {self.hook} priority {where}; policy accept;"


class Chain(NamedTuple):
    rules: tuple[Statement, ...] = ()
    base: Base | None = None
    filled: bool = False  # its rules are not the skeleton's: only that it is there


class Skeleton(NamedTuple):
    sets: dict[str, SetShape]
    chains: dict[str, Chain]  # targets of jumps come before their users


FROM, TO = "class-from", "class-to"
SOURCE = {4: "source4", 6: "source6"}
BEHIND = {4: "behind4", 6: "behind6"}
MACS, SENDERS, SENDERS_BEHIND, EXEMPT = "macs", "senders", "senders-behind", "exempt"
CONNS, ASKS = "conns", "asks"  # of these the kernel itself writes the elements

INET_SETS = {
    FROM: SetShape((GROUP,), _CLASSES, verdicts=True),
    TO: SetShape((GROUP,), _CLASSES, verdicts=True),
    "source4": SetShape((IFACE, IP4, MAC), _ENDPOINTS),
    "source6": SetShape((IFACE, IP6, MAC), _ENDPOINTS),
    "behind4": SetShape((IFACE, IP4, MAC), interval=True),
    "behind6": SetShape((IFACE, IP6, MAC), interval=True),
    MACS: SetShape((IFACE, MAC), _ENDPOINTS),
    CONNS: SetShape((IFACE,), _ENDPOINTS, dynamic=True),
    ASKS: SetShape((IFACE,), _ENDPOINTS, dynamic=True),
    EXEMPT: SetShape((IFACE,), _EXEMPT),  # untagged guests that ran at the first install
}
ARP_SETS = {
    SENDERS: SetShape((IFACE, IP4, MAC, MAC), _ENDPOINTS),
    SENDERS_BEHIND: SetShape((IFACE, IP4, MAC, MAC), interval=True),
    ASKS: SetShape((IFACE,), _ENDPOINTS, dynamic=True),
    EXEMPT: SetShape((IFACE,), _EXEMPT),
}
RESERVED_SETS = frozenset(INET_SETS)
