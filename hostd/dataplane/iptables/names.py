# Owns: the names of our objects in iptables and ipset, which are shared with everybody: ours begin with "s32". Pure.
# A chain of a policy keeps its name (28 characters is the kernel's limit); sets have 31.
from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from slash32.net import Prefix

from ...compiler.ruleset import (
    HOST_CHAINS,
    HOST_FORWARD_OUT,
    HOST_GUESTS,
    HOST_OUT,
    HOST_TO_GUESTS,
    NAME_LIMIT,
    SetKind,
)

_SHORT = {kind.value: f"s32{kind.value[0]}{kind.value[-1]}" for kind in SetKind}
OURS = "s32"
_OTHER = "s32="
_SET_LIMIT = 31
_CHAIN = re.compile(r"[A-Za-z][A-Za-z0-9_.]*-[A-Za-z0-9_.-]+")
_OURS = re.compile(r"(?:[pfs][io]|from|to|(?:tail|tier)-(?:in|out))-.+")
_OUTWARD = {"po", "fo", "so", "from"}
_OUTWARD_HOST = frozenset((HOST_OUT, HOST_FORWARD_OUT, HOST_TO_GUESTS, HOST_GUESTS))

SOURCE = {4: "s32-source4", 6: "s32-source6"}  # (address, tap) pairs
BEHIND = {4: "s32-behind4", 6: "s32-behind6"}  # (prefix, tap) pairs
OWN_SETS = frozenset((*SOURCE.values(), *BEHIND.values()))
CONSTANT = "s32+"  # a rule's own prefixes, named by their digest


def kernel_set(name: str) -> str:
    """Raises ValueError for a name that does not fit."""
    kind, dash, rest = name.partition("-")
    found = f"{_SHORT[kind]}-{rest}" if dash and kind in _SHORT else _OTHER + name
    if len(found) > _SET_LIMIT or not re.fullmatch(r"[A-Za-z0-9_.=-]+", found):
        raise ValueError(f"{name[:200]!r} is no name for a set of ipset: at most {NAME_LIMIT} letters, digits, '-'")
    return found


def abstract_set(name: str) -> str | None:
    """The other way; None: no set of a policy of ours."""
    if name.startswith(_OTHER):
        return name[len(_OTHER) :]
    head, dash, rest = name.partition("-")
    kind = next((kind for kind, short in _SHORT.items() if short == head), None)
    return f"{kind}-{rest}" if dash and kind is not None else None


def constant_set(nets: Iterable[Prefix]) -> str:
    return CONSTANT + hashlib.blake2s(" ".join(sorted(map(str, nets))).encode(), digest_size=12).hexdigest()


def policy_chain(name: str) -> str:
    """The name itself. Raises ValueError where iptables would not take it, or it does not say which way it is asked."""
    if len(name) > NAME_LIMIT or not _CHAIN.fullmatch(name) or not is_policy_chain(name):
        raise ValueError(f"{name[:200]!r} is no name for a chain: at most {NAME_LIMIT} characters, like pi-web")
    return name


def is_policy_chain(name: str) -> bool:
    """By its name it can be one of ours; others' chains stand in the same tables."""
    return name in HOST_CHAINS or _OURS.fullmatch(name) is not None


def is_outward(chain: str) -> bool:
    """What a chain of policies is asked about: what leaves an endpoint or the host, or what comes to it. Where
    `accept` leads depends on that."""
    if chain in HOST_CHAINS:
        return chain in _OUTWARD_HOST
    return chain.partition("-")[0] in _OUTWARD or chain.startswith(("tail-out-", "tier-out-"))
