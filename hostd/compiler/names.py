# Owns: the names of what hostd puts into the kernel. They fit both packet filters, say for people what they can, and
# say how high a chain stands above those that it uses, so that also who remembers nothing deletes users first. Pure.
from __future__ import annotations

import hashlib
import re

from slash32.policy import Direction

from .ruleset import HOST_CHAINS, NAME_LIMIT

_DIGEST = 12  # hexadecimal digits
_PREFIX = 3  # "pi-"
_WHOLE = NAME_LIMIT - _PREFIX
_HEAD = _WHOLE - _DIGEST - 1
_DERIVED_HEAD = _HEAD - 5  # "-", and room for 4 digits of height
_IDENTIFIER = re.compile(r"[A-Za-z0-9-]+")
_ODD = re.compile(r"[^A-Za-z0-9-]")
# No name of a policy ends so: see _readable.
_DERIVED = re.compile(r"(?:(?:tail|tier)-(?:in|out)-|.*_)[0-9a-f]{12}-([0-9]+)")
_PART_OWNER, _PART_RULES = 8, 6  # hexadecimal digits
_PART_HEAD = _WHOLE - 1 - _PART_OWNER - _PART_RULES - 4  # and room for 4 digits of number
_PART = re.compile(rf"(p[io]-.*_[0-9a-f]{{{_PART_OWNER}}})[0-9a-f]{{{_PART_RULES}}}[0-9]+")
_CLASS, _HOST = 1 << 20, 1 << 21


def digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=_DIGEST // 2).hexdigest()


def policy_chain(name: str, direction: Direction) -> str:
    return f"p{_way(direction)}-{_readable(name)}"


def profile_chain(name: str, direction: Direction) -> str:
    return f"f{_way(direction)}-{_readable(name)}"


def parts_of(name: str, direction: Direction) -> str:
    """What the names of all parts of a policy begin with, at any time."""
    return f"p{_way(direction)}-{_ODD.sub('_', name[:_PART_HEAD])}_{digest(name)[:_PART_OWNER]}"


def part_chain(name: str, direction: Direction, rules: str, number: int) -> str:
    """Of a policy with these rules, what stands between those that leave its tier."""
    return f"{parts_of(name, direction)}{digest(rules)[:_PART_RULES]}{number}"


def policy_of(chain: str) -> str:
    """What parts_of() says of the policy whose part it is; of others, the chain."""
    found = _PART.fullmatch(chain)
    return found[1] if found else chain


def staged_chain(name: str, direction: Direction, rest: str) -> str:
    """A staged policy, after which all goes on there."""
    head = _ODD.sub("_", name[:_DERIVED_HEAD])
    return f"s{_way(direction)}-{head}_{digest(name, rest)}-{height(rest) + 1}"


def tier_chain(height: int, direction: Direction, *identity: str) -> str:
    """Every chain's name says which way it is asked: one of the packet filters must know."""
    return f"tier-{_word(direction)}-{digest(*identity)}-{height}"


def tail_chain(height: int, direction: Direction, *identity: str) -> str:
    return f"tail-{_word(direction)}-{digest(*identity)}-{height}"


def class_chain(direction: Direction, *identity: str) -> str:
    return f"{'to' if direction is Direction.INGRESS else 'from'}-{digest(*identity)}"


def log_tag(kind: str, name: str, direction: Direction, index: int) -> str:
    return f"s32:{digest(kind, name, direction.value, str(index))}"


def height(chain: str) -> int:
    """Above that of every chain that it jumps or goes to. 0: a policy or profile, which uses none."""
    if chain in HOST_CHAINS:
        return _HOST
    if chain.startswith(("from-", "to-")):
        return _CLASS
    found = _DERIVED.fullmatch(chain)
    return int(found[1]) if found else 0


def is_derived(chain: str) -> bool:
    """Made for classes, and for as long as one uses it: a class's own, its tiers, tails and staged policies."""
    return 0 < height(chain) <= _CLASS


def _way(direction: Direction) -> str:
    return "i" if direction is Direction.INGRESS else "o"


def _word(direction: Direction) -> str:
    return "in" if direction is Direction.INGRESS else "out"


def _readable(name: str) -> str:
    """Unique and legal as an identifier, and still the name where that is one (it then has no underscore)."""
    if len(name) <= _WHOLE and _IDENTIFIER.fullmatch(name):
        return name
    return f"{_ODD.sub('_', name[:_HEAD])}_{digest(name)}"
