# Owns: carrying out a batch, in the order in which at no moment more passes than before it or after it: what closes
# first, then the tables (each at once), then what opens. Where that order does not exist (a set that lets some pass
# and keeps others out, or two tables that belong together), new flows meet a closed gate. Writes through its door.
from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from slash32.net import Prefix

from ...compiler.ruleset import GUEST_EGRESS, HOST_CHAINS, HOST_GUESTS, Guard
from ..netlink import Refusal
from ..nft.transaction import TransactionRefused
from . import about, classes, restore, sets
from .batch import Batch, Change, Grant
from .ipset import Member, Pair, halves
from .known import Known
from .lines import ACCEPT, Line, goto, is_plain, named
from .names import BEHIND, is_outward, kernel_set
from .restore import Edit
from .rules import constants, lines, polarity, target
from .sets import Sets, SetsRefused, Task
from .skeleton import (
    AWAY,
    CLOSED,
    EXEMPT_FROM,
    EXEMPT_IN,
    EXEMPT_TO,
    FROM,
    GATE,
    MANGLE,
    ONTO,
    POLICY_TABLES,
    RAW,
    SECURITY,
    TABLES,
    TO,
)

ACCEPT_LEADS = {(SECURITY, True): ONTO, (MANGLE, False): AWAY}
Edits = dict[str, Edit]


class Door(NamedTuple):
    """Through what, and upon what, a batch is carried out."""

    sets: Sets
    guard: Guard
    versions: tuple[int, ...]
    known: Known
    begins: Callable[[], None]  # tables are about to be written
    failed: Callable[[], None]  # what is known no longer holds
    done: Callable[[bool], None]  # whether tables were written


def carry_out(door: Door, batch: Batch) -> None:
    """Raises TransactionRefused, OSError."""
    _check_targets(door.known, batch)
    asked = _asked_by(batch)
    closing, opening, gated = _ordered(door.known, batch, asked)
    gate = gated or door.known.gated or _two_tables(door.known, batch)
    if gate or batch.touches_tables:
        door.begins()
    try:
        _sets(door, _new_sets(batch))
        if gate:
            _write(door, _closing)
            _sets(door, [t for c in batch.changes for t in _task(c)])
        else:
            _sets(door, [t for c in closing for t in _task(c)])
        _sets(door, _grants(batch.expel, add=False))
        if batch.touches_tables or gate:
            _write(door, lambda version: _edits(door, batch, version))
        if not gate:
            _sets(door, [t for c in opening for t in _task(c)])
        _sets(door, _grants(batch.admit, add=True))
        _record(door.known, batch, asked)
        _sets(door, _old_sets(door.known, batch))
        door.done(gate or batch.touches_tables)
    except (TransactionRefused, OSError):
        door.failed()
        raise


def _sets(door: Door, tasks: Sequence[Task]) -> None:
    try:
        door.sets.carry_out(tasks)
    except SetsRefused as refused:
        refusal = refused.refusal._replace(message=refused.words)
        raise TransactionRefused(refused.task.label, refusal, refused.task.what) from None


def _check_targets(known: Known, batch: Batch) -> None:
    """A rule that leads nowhere is refused by its own name, before anything is written."""
    there = (known.chains | batch.puts.keys() | {*HOST_CHAINS, GUEST_EGRESS}) - batch.gone.keys()
    for name, put in batch.puts.items():
        for rule in put.rules:
            if (to := target(rule)) is not None and to not in there:
                raise _missing(put.label, f"write chain {name}", f"there is no chain {to}")
    for group, new in batch.classes.items():
        for chain in new.chains or ():
            if chain not in there:
                raise _missing(new.label, f"class {group:#x}", f"there is no chain {chain}")


def _missing(label: object, what: str, words: str) -> TransactionRefused:
    return TransactionRefused(label, Refusal(0, errno.ENOENT, words), what)


# -- sets -------------------------------------------------------------------------------------------------------------


def _asked_by(batch: Batch) -> dict[str, dict[str, set[int]]]:
    """How the chains that are written ask sets."""
    found: dict[str, dict[str, set[int]]] = {}
    for name, put in batch.puts.items():
        asked = found.setdefault(name, {})
        for rule in put.rules:
            for set_name, sense in polarity(rule):
                asked.setdefault(set_name, set()).add(sense)
    return found


def _ordered(
    known: Known, batch: Batch, asked: dict[str, dict[str, set[int]]]
) -> tuple[list[Change], list[Change], bool]:
    """Changes that close, those that open, and whether there are such that may do either."""
    effective = _net(batch.changes)
    batch.changes = effective
    closing: list[Change] = []
    opening: list[Change] = []
    mixed = False
    for change in effective:
        senses = known.senses(change.name).union(*(chain.get(change.name, ()) for chain in asked.values()))
        if len(senses) > 1 or 0 in senses:
            mixed = True
        opens = (1 in senses) == change.add
        (opening if opens else closing).append(change)
    at_once = sum(len(change.members) for change in effective) == 1 and not batch.touches_tables
    return closing, opening, mixed and not at_once


def _net(changes: Sequence[Change]) -> list[Change]:
    """Of a set that is emptied and filled again, or changed back and forth, only what differs in the end."""
    last: dict[tuple[str, Member], Change] = {}
    removed: set[tuple[str, Member]] = set()
    for change in changes:
        for member in change.members:
            key = change.name, member
            last[key] = change
            if not change.add:
                removed.add(key)
    found: dict[int, tuple[Change, list[Member]]] = {}
    for key, change in last.items():
        if not (change.add and key in removed):
            found.setdefault(id(change), (change, []))[1].append(key[1])
    return _in_parts([change._replace(members=members) for change, members in found.values()])


def _in_parts(changes: list[Change]) -> list[Change]:
    """To ipset a /0 is two members: one of them that is, or comes to be, a member by itself is not taken away."""
    if all(isinstance(member, bytes) or member.length for change in changes for member in change.members):
        return changes
    found = [change._replace(members=tuple(_parts(change.members))) for change in changes]
    kept = {(change.name, part) for change in found if change.add for part in change.members}
    return [
        change if change.add else change._replace(members=[m for m in change.members if (change.name, m) not in kept])
        for change in found
    ]


def _parts(members: Iterable[Member]) -> Iterator[Member]:
    for member in members:
        yield from halves(member) if isinstance(member, Prefix) else (member,)


def _task(change: Change) -> list[Task]:
    return sets.changing(kernel_set(change.name), change.kind, change.members, change.add, change.label)


def _grants(grants: Iterable[Grant], add: bool) -> list[Task]:
    return [
        sets.changing_pairs(g.set, (Pair(g.source, g.tap, g.owner if add else ""),), add, g.label)[0] for g in grants
    ]


def _new_sets(batch: Batch) -> list[Task]:
    made = [sets.creating(kernel_set(name), spec, batch.labels[name]) for name, spec in batch.fresh.items()]
    filled = [task for change in batch.fill for task in _task(change)]
    own = []
    for put in batch.puts.values():
        for rule in put.rules:
            for version in (4, 6):
                for name, nets in constants(rule, version):
                    kind = sets.constant_kind(version)
                    own.append(sets.creating(name, sets.constant_spec(version, len(nets)), put.label))
                    own += sets.changing(name, kind, nets, True, put.label)
    return made + filled + own


def _old_sets(known: Known, batch: Batch) -> list[Task]:
    """Sets that no rule asks any more: the given ones, and rules' own."""
    used = Counter(name for names in known.constants.values() for name in names)
    spare = [name for name in known.all_constants if not used[name]]
    known.all_constants -= set(spare)
    return [
        *(sets.destroying(kernel_set(name), label) for name, label in batch.gone_sets.items()),
        *(sets.destroying(name) for name in spare),
    ]


# -- tables -----------------------------------------------------------------------------------------------------------


def _write(door: Door, edits: Callable[[int], Edits]) -> None:
    for version in door.versions:
        restore.write(version, edits(version))


def _closing(version: int) -> Edits:
    edits = {table: Edit() for table in POLICY_TABLES}
    for edit in edits.values():
        edit.chain(GATE, [CLOSED])
    return edits


def _two_tables(known: Known, batch: Batch) -> bool:
    """Chains that are in use change, and host endpoints ask them in both tables."""
    return bool(known.asks_host and (batch.puts.keys() & known.chains or batch.classes))


def _edits(door: Door, batch: Batch, version: int) -> Edits:
    known = door.known
    edits = {table: Edit() for table in TABLES}
    for table in POLICY_TABLES:
        edit = edits[table]
        if not known.half or batch.completes:
            edit.chain(GATE, ())  # open, if it was not
        for name, put in batch.puts.items():
            accept = "" if name == HOST_GUESTS else ACCEPT_LEADS.get((table, is_outward(name)), "")
            edit.policy(name, (lines(rule, version) for rule in put.rules), put.label, accept)
    if batch.classes:
        _edit_classes(door, batch, edits)
    if batch.exempt:
        edit_exempt(exempt_after(known, batch), edits)
    if batch.moves_behind:
        edit_behind(_behind_after(known, batch), version, edits[SECURITY])
    for table in POLICY_TABLES:
        for name, label in batch.gone.items():
            if name in known.chains:
                edits[table].remove(name, label)
    return edits


def classes_after(known: Known, batch: Batch) -> dict[int, tuple[str, str]]:
    after = dict(known.classes)
    for group, new in batch.classes.items():
        if new.chains is None:
            after.pop(group, None)
        else:
            after[group] = new.chains
    return after


def exempt_after(known: Known, batch: Batch) -> set[str]:
    on = {tap for tap, wanted in batch.exempt.items() if wanted}
    return (known.exempt | on) - (batch.exempt.keys() - on)


def _behind_after(known: Known, batch: Batch) -> set[tuple[str, Prefix]]:
    gone, come = ({(g.tap, g.source) for g in some if g.set in BEHIND.values()} for some in (batch.expel, batch.admit))
    return known.behind() - gone | come


def edit_behind(behind: set[tuple[str, Prefix]], version: int, edit: Edit) -> None:
    """Which errors a guest may send about what lies behind it; few have something there."""
    for name, act in about.BEHIND_CHAINS.items():
        edit.chain(name, about.of_behind(behind, version, act))


def _edit_classes(door: Door, batch: Batch, edits: Edits) -> None:
    """Only the way to the classes that change is written anew."""
    after = classes_after(door.known, batch)
    for root, side, tables in ((FROM, 0, POLICY_TABLES), (TO, 1, (SECURITY,))):
        new = classes.tree(root, door.guard.group_base, {g: c[side] for g, c in after.items()})
        touched = {name for group in batch.classes for name in classes.path(root, group)}
        for table in tables:
            for name in sorted(touched):
                if name in new:
                    edits[table].chain(name, new[name])
                else:
                    edits[table].remove(name)


def edit_exempt(taps: set[str], edits: Edits) -> None:
    def chain(table: str, name: str, incoming: bool, act: tuple[str, ...]) -> None:
        edits[table].chain(name, [Line(named(incoming, tap), act, f"exempt {tap}") for tap in sorted(taps)])

    taps = set(filter(is_plain, taps))
    chain(RAW, EXEMPT_IN, True, ACCEPT)
    chain(SECURITY, EXEMPT_IN, True, ACCEPT)
    chain(SECURITY, EXEMPT_FROM, True, goto(ONTO))
    chain(SECURITY, EXEMPT_TO, False, ACCEPT)


# -- afterwards -------------------------------------------------------------------------------------------------------


def _record(known: Known, batch: Batch, asked: dict[str, dict[str, set[int]]]) -> None:
    known.gated = known.half = known.half and not batch.completes
    known.classes = classes_after(known, batch)
    known.exempt = exempt_after(known, batch)
    known.sets.update(batch.fresh)
    for name, put in batch.puts.items():
        known.chains.add(name)
        known.asked[name] = asked[name]
        own = {c for rule in put.rules for v in (4, 6) for c, _ in constants(rule, v)}
        known.constants[name] = own
        known.all_constants |= own
        if name in HOST_CHAINS:
            (known.asks_host.add if put.rules else known.asks_host.discard)(name)
    for name in batch.gone:
        known.chains.discard(name)
        known.asked.pop(name, None)
        known.constants.pop(name, None)
    for name in batch.gone_sets:
        known.sets.pop(name, None)
    for grant in batch.expel:
        known.forget(grant.tap, grant.set, grant.source)
    for grant in batch.admit:
        known.note(grant.tap, grant.set, grant.source, grant.owner)

