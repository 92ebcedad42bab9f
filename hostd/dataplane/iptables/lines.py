# Owns: one rule as iptables spells it. Pure. Its digest travels as the rule's comment, so that what was loaded can be
# recognised later; `-j ACCEPT` in a chain of policies is written as where that leads (see skeleton.py).
from __future__ import annotations

import hashlib
from typing import NamedTuple

from slash32.net import Prefix, format_address

_COMMENT = 200  # bytes; the kernel's limit is 255
MARK = "s32"


def safe_comment(comment: str) -> str:
    return "".join(c if " " <= c <= "~" and c not in "\"'\\`$" else "?" for c in comment[:_COMMENT])


class Line(NamedTuple):
    match: tuple[str, ...] = ()
    act: tuple[str, ...] = ()  # (): only counted
    comment: str = ""

    @property
    def fingerprint(self) -> str:
        body = "\0".join((*self.match, "", *self.act, "", self.comment))
        return f"{hashlib.blake2s(body.encode(), digest_size=8).hexdigest()} {safe_comment(self.comment)}".rstrip()

    def text(self, chain: str, accept: str = "", verb: str = "-A", number: int | None = None) -> str:
        """`accept`: the chain that decides where the rule says ACCEPT. `number`: of the rule that it is a line of."""
        act = ("-g", accept) if accept and self.act == ACCEPT else self.act
        mark = MARK if number is None else f"{MARK}.{number}"
        note = f'-m comment --comment "{mark} {self.fingerprint}"'
        return " ".join((verb, chain, *map(_quoted, self.match), note, *map(_quoted, act)))


ACCEPT, DROP, RETURN = ("-j", "ACCEPT"), ("-j", "DROP"), ("-j", "RETURN")


def _quoted(word: str) -> str:
    """As iptables-restore takes words apart: names of interfaces may hold what it gives a meaning."""
    if not any(c in word for c in " \"\\'"):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def jump(chain: str) -> tuple[str, ...]:
    return ("-j", chain)


def goto(chain: str) -> tuple[str, ...]:
    return ("-g", chain)


# -- matches, as words ----------------------------------------------------------------------------------------------


def negated(negate: bool) -> tuple[str, ...]:
    return ("!",) if negate else ()


def net(source: bool, prefix: Prefix, negate: bool = False) -> tuple[str, ...]:
    shown = f"{format_address(prefix.network)}/{prefix.length}"
    return (*negated(negate), "-s" if source else "-d", shown)


def in_set(name: str, way: str, negate: bool = False) -> tuple[str, ...]:
    return ("-m", "set", *negated(negate), "--match-set", name, way)


def group(incoming: bool, value: int, mask: int = 0xFFFFFFFF, negate: bool = False) -> tuple[str, ...]:
    shown = f"{value:#x}" if mask == 0xFFFFFFFF else f"{value:#x}/{mask:#x}"
    return ("-m", "devgroup", *negated(negate), f"--{'src' if incoming else 'dst'}-group", shown)


def named(incoming: bool, name: str) -> tuple[str, ...]:
    return ("-i" if incoming else "-o", name)


def is_one(name: str) -> bool:
    """Not so where iptables reads the name of an interface as the beginning of many."""
    return not name.endswith("+")


def is_plain(name: str) -> bool:
    """It can be read back from a rule's comment, too."""
    return is_one(name) and safe_comment(name) == name


def ports(source: bool, slots: str, negate: bool = False) -> tuple[str, ...]:
    return ("-m", "multiport", *negated(negate), f"--{'s' if source else 'd'}ports", slots)


def ct(*states: str) -> tuple[str, ...]:
    return ("-m", "conntrack", "--ctstate", ",".join(states))


def icmp(version: int, kind: int, code: int | None = None, negate: bool = False) -> tuple[str, ...]:
    shown = str(kind) if code is None else f"{kind}/{code}"
    if version == 4:
        return ("-m", "icmp", *negated(negate), "--icmp-type", shown)
    return ("-m", "icmp6", *negated(negate), "--icmpv6-type", shown)


ICMP = {4: ("-p", "1"), 6: ("-p", "58")}
NOT_SYN = ("-p", "6", "-m", "tcp", "!", "--tcp-flags", "FIN,SYN,RST,ACK", "SYN")


def udp(source: int, destination: int) -> tuple[str, ...]:
    return ("-p", "17", "-m", "udp", "--sport", str(source), "--dport", str(destination))
