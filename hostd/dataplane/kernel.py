# Owns: the one door to this host's kernel: reads it into `Actual`, carries out plans, and records in `Actual` what was
# done. Touches: nf_tables, rtnetlink and /proc/sys through its parts (nft/, rtnl/, sysctl.py).
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from itertools import groupby
from typing import TypeGuard

from slash32.net import Address, Prefix

from ..change.moves import PARKED
from ..change.plan import (
    AddMembers,
    AddSet,
    Admit,
    DelChain,
    DelClass,
    DelMembers,
    DelSet,
    Exempt,
    Expel,
    FilterOp,
    FlushSet,
    Grow,
    Plan,
    PutChain,
    PutClass,
    PutSysctls,
    Shrink,
    Sweep,
)
from ..change.settle import Refused
from ..compiler.desired import Actual, Admitted, ClassChains, Dirty
from ..compiler.forwarding import Add, Failure, Link, Operation, Replace, Route, SetGroup, TapAddress, Way
from ..compiler.ruleset import GROUP_MASK, Guard, Rule, SetKind
from ..revocation.revoke import Flow, OwnSocket
from . import sockets, sysctl
from .filter import NFTABLES, PacketFilter, Transaction, opened
from .flows import Flows
from .groups import Groups
from .nft.admission import Admission, group
from .nft.transaction import TransactionRefused
from .record import record_filter, record_link
from .refusal import named, resting_on, scope
from .rtnl import Rtnl

_MEMBERS = frozenset((AddMembers, DelMembers))


class Kernel:
    """For one thread, in the network namespace it was made in."""

    def __init__(self, guard: Guard, owned: bool, packet_filter: str = NFTABLES) -> None:
        self.guard = guard
        self.rtnl = Rtnl()
        self.table: PacketFilter = opened(packet_filter, guard, owned, self._bridges)
        self.flows = Flows()
        self.groups = Groups(lambda op: self.rtnl.change([op]))
        self.ipv6 = sysctl.has_ipv6()

    def _bridges(self) -> list[str]:
        return [link.name for link in self.rtnl.links().values() if link.kind == "bridge"]

    def close(self) -> None:
        self.table.close()
        self.rtnl.close()
        self.flows.close()

    # -- read -----------------------------------------------------------------------------------------------------

    def load(self, exempt: Iterable[str] = ()) -> bool:
        """The guard stands; True if anything had to be written for it. `exempt`: taps it is to let be from the first
        moment on (at the first install)."""
        known = (self.rtnl.link(name) for name in exempt)
        return self.table.load([link.ifindex for link in known if link is not None])

    def link(self, name_or_index: str | int) -> Link | None:
        return self.rtnl.link(name_or_index)

    def routes(self) -> set[Route]:
        return self.rtnl.routes()

    def way_to(self, address: Address) -> Way:
        return self.rtnl.way_to(address)

    def fingerprints(self, rules: tuple[Rule, ...]) -> tuple[str, ...]:
        return self.table.fingerprints(rules)

    def tap_sysctls_hold(self, name: str) -> bool:
        try:
            return not sysctl.differing(sysctl.tap_sysctls(name, self.ipv6))
        except FileNotFoundError:
            return self.rtnl.link(name) is None  # gone, with all it had

    def read(self) -> Actual:
        found = self.table.read()
        actual = Actual(
            sets={name: spec for name, spec in found.sets.items() if spec is not None},
            chains=dict(found.chains),
            classes={number: ClassChains(*chains) for number, chains in found.classes.items()},
            members={name: list(members) for name, members in found.members.items()},
            strays=frozenset(found.strays),
            exempt=found.exempt,
        )
        self._read_taps(actual, group(found.admissions).values())
        self._read_routes(actual)
        return actual

    def _read_taps(self, actual: Actual, admissions: Iterable[Admission]) -> None:
        for admission in admissions:
            if admission.ifindex in actual.taps:  # a second MAC: none of ours, swept like other strays
                actual.strays |= self.table.pieces(admission)
                continue
            actual.taps[admission.ifindex] = Admitted(
                admission.mac, frozenset(admission.addresses), frozenset(admission.prefixes)
            )
        for ifindex, link in self.rtnl.links().items():
            if ifindex in actual.taps:
                actual.taps[ifindex].group = link.group
            elif link.group & GROUP_MASK == self.guard.group_base:
                actual.foreign_groups[ifindex] = link.group
        neighbours: dict[int, list[tuple[bytes, bytes]]] = {}
        for neighbour in self.rtnl.neighbours():
            neighbours.setdefault(neighbour.ifindex, []).append((neighbour.address, neighbour.mac))
        gateways = {address.ifindex for address in self.rtnl.tap_addresses()}
        for ifindex in (neighbours.keys() | gateways) - actual.taps.keys():  # what is left of an endpoint is ours, too
            actual.taps[ifindex] = Admitted(group=actual.foreign_groups.pop(ifindex, 0))
        for ifindex, admitted in actual.taps.items():
            admitted.neighbours = frozenset(neighbours.get(ifindex, ()))
            admitted.gateway = admitted.sysctls = ifindex in gateways  # written together; sysctls are audited

    def _read_routes(self, actual: Actual) -> None:
        extra = []
        for route in self.rtnl.routes():
            have = actual.routes.setdefault(route.prefix, route)
            if have is not route:
                actual.routes[route.prefix] = min(have, route)
                extra.append(max(have, route))
        actual.extra_routes = tuple(extra)

    # -- write ----------------------------------------------------------------------------------------------------

    def apply(self, todo: Plan, actual: Actual) -> list[Refused]:
        """Carries out the plan, in its order. What is refused stops only what depends on it."""
        if not (todo.close or todo.open or todo.collect) and all(type(op) in _MEMBERS for op in todo.filter):
            actual.extra_routes = ()
            return self._filter(todo.filter, actual)
        before = {op.ifindex: actual.taps[op.ifindex].group for op in todo.close if _parks(op)}
        refused = self._links(todo.close, actual) if todo.close else []
        haunted = self._end_old_flows(todo.filter, actual)
        refused += haunted.values()
        fresh, rest = _fresh_intervals([op for op in todo.filter if id(op) not in haunted])
        refused += self._filter(fresh, actual) + self._filter(rest, actual)
        if todo.open:
            refused += self._open(todo, actual, refused)
            self._leave_parking(before, actual)
        unused, kept = _collectable(todo.collect, actual)
        refused += self._filter(unused, actual)
        actual.extra_routes = ()
        return refused + kept

    def _open(self, todo: Plan, actual: Actual, before: Sequence[Refused]) -> list[Refused]:
        """But for what rests on what was refused `before`."""
        refused: list[Refused] = []
        unready = {op.ifindex for op in todo.filter if isinstance(op, Admit) and not _admitted(op, actual)}
        refused += self._put_sysctls([op for op in todo.open if isinstance(op, PutSysctls)], actual)
        unset = {op.ifindex for op in todo.open if isinstance(op, PutSysctls) and not _has_sysctls(op, actual)}
        unready |= unset
        asked = {op.group: op.chains for op in todo.filter if isinstance(op, PutClass)}
        opening: list[Operation] = []
        for op in todo.open:
            if isinstance(op, SetGroup) and (op.ifindex in unready or not _is_class(op.group, asked, actual)):
                refused.append(self._not_opened(op.ifindex, [*before, *refused]))
            elif not isinstance(op, PutSysctls) and not _is_gateway(op, unset):
                opening.append(op)
        return refused + self._links(opening, actual)

    def _leave_parking(self, before: Mapping[int, int], actual: Actual) -> None:
        """Who could not get into the next class is back in the last good one."""
        still = {ifindex for ifindex, tap in actual.taps.items() if _is_parked(tap.group)} if before else set()
        self._links([SetGroup(ifindex, group) for ifindex, group in before.items() if ifindex in still], actual)

    def _end_old_flows(self, ops: Sequence[Grow], actual: Actual) -> dict[int, Refused]:
        """Addresses that come to a tap begin anew: what was open to another guest is not open to this one. A tap that
        has lost its filter only is healed with its flows. What is refused, by the id of its operation."""
        refused = {}
        for op in ops:
            fresh = _fresh(op, actual) if isinstance(op, Admit) else None
            if isinstance(op, Admit) and fresh is not None:
                try:
                    self.end_flows(fresh)
                except OSError as error:
                    why = f"flows that its addresses had before: {error}"
                    refused[id(op)] = Refused(self._tap_name(op.ifindex), why, Dirty(taps={op.ifindex}))
        return refused

    def end_flows(self, of: Admit) -> None:
        """Raises OSError."""
        self.flows.forget((*of.addresses, *of.prefixes))

    def end_condemned(self, near: Collection[Address | Prefix], condemned: Callable[[Flow], bool]) -> int:
        """Of the tracked flows from or to these; how many there were. Raises OSError."""
        return self.flows.end(near, condemned)

    def end_sockets(self, of: Collection[OwnSocket]) -> None:
        """Raises OSError."""
        if of:
            sockets.destroy(of)

    def _not_opened(self, ifindex: int, refused: Sequence[Refused]) -> Refused:
        why = refused[-1].message if refused else "its class of policies is not in the kernel"
        return Refused(self._tap_name(ifindex), why, Dirty(taps={ifindex}))

    def _tap_name(self, ifindex: int) -> str:
        link = self.rtnl.link(ifindex)
        return f"tap {link.name}" if link is not None else f"tap #{ifindex}"

    def _put_sysctls(self, ops: Sequence[PutSysctls], actual: Actual) -> list[Refused]:
        refused = []
        for op in ops:
            try:
                self.write_sysctls(op.name)
            except OSError as error:
                refused.append(Refused(f"tap {op.name}", f"sysctl: {error}", Dirty(taps={op.ifindex})))
            else:
                actual.taps.setdefault(op.ifindex, Admitted()).sysctls = True
        return refused

    def write_sysctls(self, tap: str) -> None:
        """Raises OSError."""
        sysctl.write_all(sysctl.tap_sysctls(tap, self.ipv6))

    def _links(self, batch: Sequence[Operation], actual: Actual) -> list[Refused]:
        failures = []
        for are_groups, run in groupby(batch, key=lambda op: isinstance(op, SetGroup)):
            if are_groups:
                failures += [f for op in run if isinstance(op, SetGroup) for f in self.groups.set(op)]
            else:
                failures += self.rtnl.change(list(run))
        failed = {id(f.operation) for f in failures}
        for done in batch:
            if id(done) not in failed:
                record_link(done, actual)
        return [self._refusal(f) for f in failures]

    def _refusal(self, failure: Failure) -> Refused:
        op = failure.operation
        item = op if isinstance(op, SetGroup) else op.new if isinstance(op, Replace) else op.item
        if isinstance(item, Route):
            return Refused(f"route {item.prefix}", failure.message, Dirty(routes={item.prefix}))
        return Refused(self._tap_name(item.ifindex), failure.message, Dirty(taps={item.ifindex}))

    def _filter(self, ops: Sequence[FilterOp], actual: Actual) -> list[Refused]:
        """All in one transaction; where the kernel refuses one, all but that one and what rests on it."""
        refused: list[Refused] = []
        pending = list(ops)
        while pending:
            try:
                transaction = self.table.transaction()
                for number, op in enumerate(pending):
                    _write(transaction, op, number)
                transaction.commit()
            except TransactionRefused as refusal:
                if not isinstance(refusal.label, int):
                    return refused + [self._filter_refusal(op, refusal.message) for op in pending]
                bad = pending[refusal.label]
                dropped = resting_on(pending, refusal.label, actual)
                refused += [
                    self._filter_refusal(op, refusal.message if op is bad else f"rests on {named(bad)}")
                    for number, op in enumerate(pending)
                    if number in dropped
                ]
                pending = [op for number, op in enumerate(pending) if number not in dropped]
                continue
            for op in pending:
                record_filter(op, actual, self.fingerprints)
            break
        return refused

    def _filter_refusal(self, op: FilterOp, why: str) -> Refused:
        name = self._tap_name(op.ifindex) if isinstance(op, Admit | Expel | Exempt) else named(op)
        return Refused(name, why, scope(op))


def _fresh(op: Admit, actual: Actual) -> Admit | None:
    """What is new here of it. Where a guest was let in, and its filter is found gone or damaged, it is none: that is
    healed with its flows."""
    tap = actual.taps.get(op.ifindex, Admitted())
    if not (tap.addresses or tap.prefixes):
        return None if tap.group or op.ifindex in actual.foreign_groups else op
    if actual.members is not None:
        return None  # this was read, not written by us
    addresses = tuple(a for a in op.addresses if a not in tap.addresses)
    prefixes = tuple(p for p in op.prefixes if p not in tap.prefixes)
    return op._replace(addresses=addresses, prefixes=prefixes) if addresses or prefixes else None


def _fresh_intervals(ops: list[Grow]) -> tuple[list[Grow], list[Grow]]:
    """New sets of prefixes go before the rest, which asks them: within one transaction Linux switches rules first and
    then, one by one, what sets of intervals hold (pipapo always, rbtree since 6.18). "In none of them" would hold."""
    names = {op.name for op in ops if isinstance(op, AddSet) and op.spec.kind in (SetKind.NET4, SetKind.NET6)}
    if not names:
        return [], ops
    parts: tuple[list[Grow], list[Grow]] = [], []
    for op in ops:
        parts[not (isinstance(op, AddSet | AddMembers) and op.name in names)].append(op)
    return parts


def _is_parked(group: int) -> bool:
    return group & ~GROUP_MASK == PARKED


def _parks(op: Operation) -> TypeGuard[SetGroup]:
    return isinstance(op, SetGroup) and _is_parked(op.group)


def _is_gateway(op: Operation, of: Set[int]) -> bool:
    """The gateway's address on a tap is read back as the sign that its sysctls were written."""
    return isinstance(op, Add) and isinstance(op.item, TapAddress) and op.item.ifindex in of


def _admitted(op: Admit, actual: Actual) -> bool:
    tap = actual.taps.get(op.ifindex)
    have = (tap.mac, tap.addresses, tap.prefixes) if tap is not None else None
    return have == (op.mac, frozenset(op.addresses), frozenset(op.prefixes))


def _is_class(group: int, asked: Mapping[int, ClassChains], actual: Actual) -> bool:
    """Also the one that it was to be turned into, if it was `asked` to."""
    have = actual.classes.get(group)
    return have is not None and have == asked.get(group, have)


def _has_sysctls(op: PutSysctls, actual: Actual) -> bool:
    tap = actual.taps.get(op.ifindex)
    return tap is not None and tap.sysctls


def _collectable(ops: Sequence[Shrink], actual: Actual) -> tuple[list[Shrink], list[Refused]]:
    """Without the classes that a tap is still in, because the way into its next one was refused: its last good policy
    stays, and is collected when it has left."""
    if not ops:
        return [], []
    carried = {tap.group for tap in actual.taps.values()}
    leaving = {op.group for op in ops if isinstance(op, DelClass) and op.group not in carried}
    chains = {name for group, pair in actual.classes.items() if group not in leaving for name in pair}
    kept = [op for op in ops if isinstance(op, DelClass) and op.group in carried]
    kept_chains = [op for op in ops if isinstance(op, DelChain) and op.name in chains]
    return [op for op in ops if op not in kept and op not in kept_chains], [
        Refused(named(op), "a tap is still in its class", scope(op)) for op in kept_chains
    ]


def _write(transaction: Transaction, op: FilterOp, label: int) -> None:
    match op:
        case AddSet(name, spec):
            transaction.add_set(name, spec, label)
        case FlushSet(name):
            transaction.flush_set(name, label)
        case AddMembers(name, spec, members):
            transaction.add_members(name, spec.kind, members, label)
        case DelMembers(name, spec, members):
            transaction.delete_members(name, spec.kind, members, label)
        case PutChain(name, rules):
            transaction.put_chain(name, rules, label)
        case PutClass(number, chains):
            if op.turned:
                transaction.delete_class(number, label)
            transaction.put_class(number, chains.egress, chains.ingress, label)
        case Admit():
            transaction.admit(Admission(*op), label)
        case Expel():
            transaction.expel(Admission(*op), label)
        case Exempt(ifindex, on):
            transaction.exempt(ifindex, on, label)
        case Sweep(strays):
            transaction.sweep(strays, label)
        case DelClass(number):
            transaction.delete_class(number, label)
        case DelChain(name):
            transaction.delete_chain(name, label)
        case DelSet(name):
            transaction.delete_set(name, label)
