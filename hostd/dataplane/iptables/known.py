# Owns: what is known to stand in iptables and ipset, from the way they were read: chains with their fingerprints,
# classes, how sets are asked. Pure.
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from slash32.net import Prefix

from ...compiler.ruleset import HOST_CHAINS, SetSpec
from . import classes, ipset
from .entries import Entry, Table
from .ipset import Header
from .lines import MARK
from .names import BEHIND, CONSTANT, abstract_set, is_policy_chain
from .skeleton import (
    CLOSED,
    EXEMPT_FROM,
    EXEMPT_IN,
    EXEMPT_TO,
    FILLED,
    FROM,
    GATE,
    MANGLE,
    POLICY_TABLES,
    RAW,
    SECURITY,
    TO,
)

Tables = Mapping[tuple[int, str], Table]  # by IP version and name
FOREIGN = "?"


@dataclass
class Known:
    """Kept in step by transactions; thrown away after one that failed."""

    chains: set[str] = field(default_factory=set)  # of policies
    classes: dict[int, tuple[str, str]] = field(default_factory=dict)
    exempt: set[str] = field(default_factory=set)  # taps
    asked: dict[str, dict[str, set[int]]] = field(default_factory=dict)  # chain -> set -> senses
    constants: dict[str, set[str]] = field(default_factory=dict)  # chain -> its own sets
    all_constants: set[str] = field(default_factory=set)
    pairs: dict[str, dict[tuple[str, Prefix], str]] = field(default_factory=dict)  # tap -> (set, source) -> owner
    taps: dict[str, str] = field(default_factory=dict)  # owner -> tap
    sets: dict[str, SetSpec] = field(default_factory=dict)

    gated: bool = False  # a change that failed left its gate closed
    half: bool = False  # and only who has compared all with what is desired may open it
    asks_host: set[str] = field(default_factory=set)  # of HOST_CHAINS, those that hold something

    def note(self, tap: str, name: str, source: Prefix, owner: str) -> None:
        self.pairs.setdefault(tap, {})[name, source] = owner
        self.taps[owner] = tap

    def forget(self, tap: str, name: str, source: Prefix) -> None:
        left = self.pairs.get(tap, {})
        owner = left.pop((name, source), "")
        if owner not in left.values():
            self.taps.pop(owner, None)
        if not left:
            self.pairs.pop(tap, None)

    def behind(self) -> set[tuple[str, Prefix]]:
        """(tap, prefix)"""
        return {(tap, p) for tap, pairs in self.pairs.items() for name, p in pairs if name in BEHIND.values()}

    def senses(self, name: str) -> set[int]:
        return {sense for asked in self.asked.values() for sense in asked.get(name, ())}


def note(entry: Entry) -> str:
    """The fingerprint that a rule carries; foreign ones begin "?"."""
    mark, _, rest = entry.comment.partition(" ")
    return rest if mark.partition(".")[0] == MARK and rest else f"{FOREIGN} {entry.comment}".rstrip()


def notes(table: Table, chain: str) -> tuple[str, ...]:
    return tuple(map(note, table.chains.get(chain, ())))


def is_gated(tables: Tables) -> bool:
    return any(tables[version, name].chains.get(GATE) for version, name in tables if name in POLICY_TABLES)


def is_closed(table: Table, chain: str) -> bool:
    """The gate, by us."""
    return chain == GATE and notes(table, chain) == (CLOSED.fingerprint,)


def policies(tables: Tables) -> set[str]:
    """Chains of policies: by their names, and what is in them or that they stand in both tables."""
    places: dict[str, set[str]] = {}
    for (_, name), table in tables.items():
        for chain, rules in table.chains.items() if name in POLICY_TABLES else ():
            if is_policy_chain(chain):
                marked = any(not note(entry).startswith(FOREIGN) for entry in rules)
                places.setdefault(chain, set()).update(POLICY_TABLES if marked else {name})
    return {chain for chain, where in places.items() if len(where) == len(POLICY_TABLES)}


def fingerprints(tables: Tables) -> dict[str, tuple[str, ...]]:
    """Of the chains of policies. One that is not the same wherever it should be has a stranger at its end."""
    found: dict[str, tuple[str, ...]] = {}
    filled = {chain for table in tables.values() for chain, rules in table.chains.items() if rules}
    names = {chain for chain in policies(tables) if chain not in HOST_CHAINS or chain in filled}
    versions = sorted({version for version, _ in tables})
    for chain in names:
        copies = [
            tuple(f"{v} {n}" for v in versions for n in notes(tables[v, name], chain)) for name in POLICY_TABLES
        ]
        missing = any(chain not in tables[v, name].chains for v in versions for name in POLICY_TABLES)
        found[chain] = copies[0] if copies[0] == copies[1] and not missing else (*copies[0], FOREIGN)
    return found


def classes_of(tables: Tables) -> tuple[dict[int, tuple[str, str]], set[int]]:
    """Groups that stand in every tree, with the same chains, and those that do not."""
    sides: list[tuple[bool, dict[int, str]]] = []
    for (_, name), table in sorted(tables.items()):
        for root, head in ((FROM, "s32-cf-"), (TO, "s32-ct-")):
            if name == SECURITY or (name == MANGLE and root == FROM):
                sides.append((root == FROM, _leaves(table, head)))
    if not sides:
        return {}, set()
    everything = {group for _, side in sides for group in side}
    found = {}
    for group in everything:
        out, into = ({side.get(group) for way, side in sides if way is which} for which in (True, False))
        if len(out) == len(into) == 1 and None not in out | into:
            found[group] = (str(*out), str(*into))
    return found, everything - found.keys()


def _leaves(table: Table, head: str) -> dict[int, str]:
    found = {}
    for chain, rules in table.chains.items():
        if chain.startswith(head):
            for entry in rules:
                item = classes.class_of(note(entry).partition(" ")[2])
                if item is not None and entry.verdict == f"-g {item[1]}":
                    found[item[0]] = item[1]
    return found


def exempted(tables: Tables) -> tuple[set[str], set[str]]:
    """Taps that every table exempts, and those that only some do."""
    sides = [
        {note(entry).partition(" ")[2].removeprefix("exempt ") for entry in table.chains.get(chain, ())}
        for (_, name), table in tables.items()
        for chain in (EXEMPT_IN, EXEMPT_FROM, EXEMPT_TO)
        if name in (RAW, SECURITY) and chain in FILLED[name]
    ]
    every = set.intersection(*sides) if sides else set()
    return every, set.union(*sides) - every if sides else set()


def asked(tables: Tables, names: Mapping[int, str]) -> dict[str, dict[str, set[int]]]:
    """How each chain asks sets: +1, -1 or 0 (see rules.polarity), by the rules as they stand. `names` by index."""
    found: dict[str, dict[str, set[int]]] = {}
    for (_, name), table in tables.items():
        if name != SECURITY:
            continue
        for chain, rules in table.chains.items():
            for entry in rules:
                for index, inverted in entry.sets:
                    own = abstract_set(names.get(index, ""))
                    if own is not None and (sense := _sense(entry.verdict)) is not None:
                        found.setdefault(chain, {}).setdefault(own, set()).add(-sense if inverted else sense)
    return found


def _sense(verdict: str) -> int | None:
    if verdict in ("ACCEPT", "-g s32-onto", "-g s32-away"):
        return 1
    if verdict == "DROP":
        return -1
    return 0 if verdict.startswith("-") or verdict == "RETURN" else None


def constants(tables: Tables, names: Mapping[int, str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for table in tables.values():
        for chain, rules in table.chains.items():
            own = {names.get(index, "") for entry in rules for index, _ in entry.sets}
            found.setdefault(chain, set()).update(name for name in own if name.startswith(CONSTANT))
    return found


def specifications(headers: Iterable[Header]) -> dict[str, SetSpec | None]:
    found = ((abstract_set(head.name), ipset.kind_of(head)) for head in headers)
    return {name: spec for name, spec in found if name is not None}


def counters(tables: Tables, chains: Collection[str] | None) -> dict[str, tuple[tuple[int, int], ...]]:
    """Of each rule, all its lines together. Rules at the end that have no line are left out."""
    sums: dict[str, dict[int, tuple[int, int]]] = {}
    for (_, name), table in tables.items():
        for chain in table.chains.keys() & chains if chains is not None else table.chains:
            for entry in table.chains[chain] if name in POLICY_TABLES else ():
                number = entry.comment.partition(" ")[0].partition(".")[2]
                if number.isdecimal():
                    rules = sums.setdefault(chain, {})
                    packets, size = rules.get(int(number), (0, 0))
                    rules[int(number)] = packets + entry.packets, size + entry.size
    return {c: tuple(rules.get(n, (0, 0)) for n in range(max(rules) + 1)) for c, rules in sums.items()}
