# Owns: the packet filter on a host of iptables-legacy, behind filter.PacketFilter: putting the guard up, reading back,
# opening transactions, noticing what others change. Holds one netlink socket to ipset. One thread.
from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from slash32.net import host_prefix

from ...compiler.ruleset import GUEST_EGRESS, HOST_CHAINS, Guard, Rule
from ..nft.admission import Admission, Granted
from ..nft.counters import Counts
from ..nft.reading import Actual
from . import about, entries, known, restore, sets
from .entries import Table
from .ipset import PAIRS, Header
from .known import Known, Tables
from .lines import Line, goto, jump, named
from .names import BEHIND, CONSTANT, OWN_SETS, SOURCE, abstract_set
from .restore import Edit
from .rules import fingerprints
from .sets import Sets, Task
from .skeleton import BRIDGES, FILLED, ONTO, POLICY_TABLES, SECURITY, TABLES, part
from .steps import Door, edit_behind, edit_exempt
from .stray import Stray, StrayClass, StrayExempt, StrayGate, StrayPair
from .transaction import Transaction
from .watch import Watch

_ENDPOINTS = 65536
_IPV6 = Path("/proc/net/if_inet6")


class IptablesFilter:
    """Tables raw, mangle and security of iptables-legacy, and sets of ipset."""

    def __init__(self, guard: Guard, bridges: Callable[[], Collection[str]] = tuple) -> None:
        self._guard, self._bridges = guard, bridges
        self._sets = Sets()
        self._versions = (4, 6) if _IPV6.exists() else (4,)
        self._known: Known | None = None
        self._half = False  # somebody ended in the middle of a change, and nobody has completed it yet
        self._watch = Watch(self._sets, self._versions, bridges)
        self.asleep = False  # all is there, but no packet is led there yet

    def close(self) -> None:
        self._sets.close()

    @property
    def port(self) -> int:
        return 0  # of nf_tables, which says nothing of us

    def transaction(self) -> Transaction:
        if self._known is None:
            self._learn(self._tables(), self._sets.headers())
        assert self._known is not None
        told = self._watch.begins, self._forget, self._wrote
        return Transaction(Door(self._sets, self._guard, self._versions, self._known, *told))

    def _forget(self) -> None:
        self._half = self._known is not None and self._known.half
        self._known = None

    def _wrote(self, tables: bool) -> None:
        self._watch.wrote(tables, self._sets.touched)
        self._sets.touched.clear()

    def fingerprints(self, rules: Sequence[Rule]) -> tuple[str, ...]:
        """What read() gives for a chain of these rules."""
        return fingerprints(rules, self._versions)

    def counters(self, chains: Collection[str] | None = None) -> Counts:
        """Packets and bytes of each rule, by chain; of all that iptables counts, which is every rule."""
        return known.counters(self._tables(), chains)

    @staticmethod
    def pieces(admission: Admission) -> frozenset[Hashable]:
        """Of one that stands beside another of the same interface: what a sweep is to take away."""
        granted = [(SOURCE[4 if len(a) == 4 else 6], host_prefix(a)) for a in admission.addresses]
        granted += [(BEHIND[p.version], p) for p in admission.prefixes]
        tap = _name(admission.ifindex)
        return frozenset(StrayPair(name, tap, source) for name, source in granted)

    # -- the guard ------------------------------------------------------------------------------------------------

    def load(self, exempt: Iterable[int] = ()) -> bool:
        """Make the guard stand, each table at once, and say whether anything had to be written. Sets, chains, classes
        and admissions stay, and a gate that is closed: behind it may be half of a change. `exempt` are interfaces to be
        let be from then on. Raises TransactionRefused, OSError."""
        tables, headers = self._tables(), self._sets.headers()
        bridges = frozenset(self._bridges())
        self._half = known.is_gated(tables)
        self._learn(tables, headers)
        right = self._stands(tables, headers) and bridges == self._bridges_in(tables) and self._knows_behind(tables)
        if not right:
            self._sets.carry_out([self._own_set(name) for name in sorted(OWN_SETS)])
            taps = {_name(ifindex) for ifindex in exempt} if exempt else None
            for version in reversed(self._versions):
                restore.write(version, self._repair(tables, version, bridges, taps))
            self._learn(self._tables(), self._sets.headers())
        self.settled()
        return not right

    @property
    def _places(self) -> list[int]:
        """Of our rule among those of a built-in chain."""
        return [] if self.asleep else [0]

    def stands(self) -> bool:
        return self._stands(self._tables(), self._sets.headers())

    def _stands(self, tables: Tables, headers: dict[str, Header]) -> bool:
        return all(headers.get(n) is not None and headers[n].type == PAIRS for n in OWN_SETS) and all(
            self._is_right(tables[version, name], name, version) for version in self._versions for name in TABLES
        )

    def _is_right(self, table: Table, name: str, version: int) -> bool:
        wanted = part(self._guard, name, version)
        return (
            all(_hooked(table, hook, chain) == self._places for hook, chain in wanted.hooks.items())
            and all(chain in table.chains for chain in FILLED[name])
            and all(
                chain in table.chains and known.notes(table, chain) == tuple(line.fingerprint for line in lines)
                for chain, lines in wanted.chains.items()
                if not known.is_closed(table, chain)
            )
        )

    def _knows_behind(self, tables: Tables) -> bool:
        assert self._known is not None
        behind = self._known.behind()
        return all(
            known.notes(tables[version, SECURITY], name)
            == tuple(line.fingerprint for line in about.of_behind(behind, version, act))
            for version in self._versions
            for name, act in about.BEHIND_CHAINS.items()
        )

    @staticmethod
    def _bridges_in(tables: Tables) -> frozenset[str]:
        found = known.notes(tables[4, SECURITY], BRIDGES)
        return frozenset(n.partition(" ")[2].removeprefix("bridge ") for n in found)

    @staticmethod
    def _own_set(name: str) -> Task:
        version = 4 if name.endswith("4") else 6
        return sets.creating_pairs(name, version, _ENDPOINTS)

    def _repair(
        self, tables: Tables, version: int, bridges: Collection[str], exempt: Collection[str] | None
    ) -> dict[str, Edit]:
        edits = {name: Edit() for name in TABLES}
        for name, edit in edits.items():
            table, wanted = tables[version, name], part(self._guard, name, version)
            if self._is_right(table, name, version):
                continue
            for chain in FILLED[name]:
                if chain not in table.chains:
                    edit.chain(chain, ())
            for chain, lines in wanted.chains.items():
                if not known.is_closed(table, chain):
                    edit.chain(chain, lines)
            for hook, chain in wanted.hooks.items():
                if _hooked(table, hook, chain) != self._places:
                    _hook_up(edit, table, hook, chain, self._places)
        edits[SECURITY].chain(BRIDGES, [
            Line(named(incoming, bridge), goto(ONTO), f"bridge {bridge}")
            for bridge in sorted(bridges) for incoming in (True, False)
        ])  # fmt: skip
        assert self._known is not None
        edit_behind(self._known.behind(), version, edits[SECURITY])
        if exempt is not None:
            edit_exempt(set(exempt), edits)
        return edits

    # -- read -----------------------------------------------------------------------------------------------------

    def read(self) -> Actual:
        """Everything. What others change meanwhile shows as a change afterwards. Raises OSError."""
        self.settled()
        tables, headers = self._tables(), self._sets.headers()
        self._half = known.is_gated(tables)
        self._learn(tables, headers)
        assert self._known is not None
        specs = known.specifications(headers.values())
        granted, lost = self._admissions()
        groups, half_classes = known.classes_of(tables)
        taps, half_taps = known.exempted(tables)
        indexes = {tap: _index(tap) for tap in taps}
        strays: set[Stray] = {StrayClass(group) for group in half_classes}
        strays |= {StrayExempt(tap) for tap in half_taps | {t for t, i in indexes.items() if not i}}
        if self._half:
            strays.add(StrayGate())
        return Actual(
            skeleton_ok=self._stands(tables, headers),
            chains=known.fingerprints(tables),
            sets=specs,
            members={n: self._sets.members(self._kernel(headers, n), s.kind) for n, s in specs.items() if s},  # type: ignore[misc]
            classes=groups,
            admissions=granted,
            exempt=frozenset(i for i in indexes.values() if i),
            strays=frozenset((*strays, *lost)),  # type: ignore[arg-type]  # handed back to sweep(), as they are
        )

    @staticmethod
    def _kernel(headers: dict[str, Header], name: str) -> str:
        return next(own for own in headers if abstract_set(own) == name)

    def _tables(self) -> dict[tuple[int, str], Table]:
        found = {}
        for version in self._versions:
            for name in TABLES:
                table = entries.read(version, name)
                if table is None:
                    raise OSError(errno.ENOPROTOOPT, f"this kernel has no IPv{version} table {name} of iptables-legacy")
                found[version, name] = table
        return found

    def _learn(self, tables: Tables, headers: dict[str, Header]) -> None:
        indexes = {i for t in tables.values() for rs in t.chains.values() for e in rs for i, _ in e.sets}
        names = entries.set_names(indexes)
        now = Known(
            chains=known.policies(tables),
            classes=known.classes_of(tables)[0],
            exempt=known.exempted(tables)[0],
            asked=known.asked(tables, names),
            constants=known.constants(tables, names),
            all_constants={name for name in headers if name.startswith(CONSTANT)},
            sets={n: s for n, s in known.specifications(headers.values()).items() if s is not None},
            gated=known.is_gated(tables),
            half=self._half,
            asks_host={c for v, n in tables for c in HOST_CHAINS if tables[v, n].chains.get(c)},
        )
        for name in OWN_SETS & headers.keys():
            for pair in self._sets.pairs(name):
                now.note(pair.tap, name, pair.prefix, pair.owner)
        self._known = now

    def _admissions(self) -> tuple[frozenset[Granted], set[Stray]]:
        """Grants whose tap still is the interface that they were written for, and the others."""
        assert self._known is not None
        granted: set[Granted] = set()
        strays: set[Stray] = set()
        for tap, pairs in self._known.pairs.items():
            index = _index(tap)
            for (name, source), owner in pairs.items():
                number, _, mac = owner.partition(" ")
                if index and number == str(index) and len(mac) == 17:
                    what = source.network if name in SOURCE.values() else source
                    granted.add((index, bytes.fromhex(mac.replace(":", "")), what))
                else:
                    strays.add(StrayPair(name, tap, source))
        return frozenset(granted), strays

    # -- others ---------------------------------------------------------------------------------------------------

    def changed(self) -> bool:
        """Whether something of iptables, ipset or the bridges is not as it was after the last read(), load() or commit:
        nobody is told of that here."""
        return self._watch.changed()

    def heard_by(self, listen: Callable[[bool], None]) -> None:
        """Nobody is told of what we write."""

    def settled(self) -> None:
        self._watch.settled()
        self._sets.touched.clear()

    # -- in place of the other packet filter ------------------------------------------------------------------------

    def prime(self, classes: Mapping[int, tuple[str, str]], exempt: Iterable[int]) -> None:
        """The device groups that taps have already, from the other packet filter; their chains are filled later."""
        change = self.transaction()
        for group, chains in classes.items():
            for chain in chains:
                change.put_chain(chain, (), None)
            change.put_class(group, *chains, None)
        for ifindex in exempt:
            change.exempt(ifindex, True, None)
        change.commit()

    def wake(self) -> None:
        """From now on packets are asked."""
        self.asleep = False
        self.load()

    @staticmethod
    def is_there() -> bool:
        """Something of ours is. Makes no table to find that out."""
        door = Sets()
        try:
            return bool(OWN_SETS & door.headers().keys())
        except OSError:
            return False  # no ipset in this kernel
        finally:
            door.close()

    # -- the end --------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Takes all of it away, and nothing else. Raises TransactionRefused, OSError."""
        tables = self._tables()
        for version in self._versions:
            edits = {name: Edit() for name in TABLES}
            for name, edit in edits.items():
                ours = known.policies(tables) | {GUEST_EGRESS} if name in POLICY_TABLES else set()
                _take_down(edit, tables[version, name], part(self._guard, name, version).hooks, ours)
            restore.write(version, edits)
        own_sets = [n for n in self._sets.headers() if n in OWN_SETS or n.startswith(CONSTANT) or abstract_set(n)]
        self._sets.carry_out([sets.destroying(name) for name in own_sets])
        self._known = None


def _hooked(table: Table, hook: str, chain: str) -> list[int]:
    """Where our rule stands among those of a built-in chain."""
    return [at for at, entry in enumerate(table.chains.get(hook, ())) if entry.verdict == f"-j {chain}"]


def _hook_up(edit: Edit, table: Table, hook: str, chain: str, places: Sequence[int]) -> None:
    for at in reversed(_hooked(table, hook, chain)):
        edit.raw(f"-D {hook} {at + 1}")
    if places:
        edit.raw(Line((), jump(chain)).text(f"{hook} 1", verb="-I"))


def _take_down(edit: Edit, table: Table, hooks: dict[str, str], ours: Collection[str]) -> None:
    for hook, chain in hooks.items():
        for at in reversed(_hooked(table, hook, chain)):
            edit.raw(f"-D {hook} {at + 1}")
    for chain in table.chains:
        if chain.startswith("s32-") or chain in ours:
            edit.remove(chain)


def _name(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return ""


def _index(tap: str) -> int:
    try:
        return socket.if_nametoindex(tap)
    except OSError:
        return 0

