# Owns: the one door to this host's kernel: reads it into `Actual`, carries out plans, and records in `Actual` what was
# done. Touches: nf_tables, rtnetlink and /proc/sys through its parts (nft/, rtnl/, sysctl.py).
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..desired import Actual, Admitted, ClassChains, Dirty
from ..forwarding import Add, Delete, Failure, Link, Neighbour, Operation, Replace, Route, SetGroup, TapAddress
from ..plan import (
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
    LinkOp,
    Plan,
    PutChain,
    PutClass,
    PutSysctls,
    Sweep,
)
from ..ruleset import GROUP_MASK, Guard, Jump, Rule
from ..ruleset import InSet as InSetMatch
from ..settle import Refused
from . import sysctl
from .nft.admission import Admission, group
from .nft.rules import fingerprint
from .nft.table import NftTable
from .nft.transaction import Transaction, TransactionRefused
from .rtnl import Rtnl


class Kernel:
    """For one thread, in the network namespace it was made in."""

    def __init__(self, guard: Guard, owned: bool) -> None:
        self.guard = guard
        self.table = NftTable(guard, owned)
        self.rtnl = Rtnl()
        self.ipv6 = sysctl.has_ipv6()

    def close(self) -> None:
        self.table.close()
        self.rtnl.close()

    # -- read -----------------------------------------------------------------------------------------------------

    def load(self, exempt: Iterable[str] = ()) -> bool:
        """The guard stands; True if anything had to be written for it. `exempt`: taps it is to let be from the first
        moment on (at the first install)."""
        known = (self.rtnl.link(name) for name in exempt)
        return self.table.load([link.ifindex for link in known if link is not None])

    def link(self, name_or_index: str | int) -> Link | None:
        return self.rtnl.link(name_or_index)

    def fingerprints(self, rules: tuple[Rule, ...]) -> tuple[str, ...]:
        return tuple(fingerprint(rule) for rule in rules)

    def tap_sysctls_hold(self, name: str) -> bool:
        return not sysctl.differing(sysctl.tap_sysctls(name, self.ipv6))

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
                actual.strays |= frozenset(admission.elements())
                continue
            actual.taps[admission.ifindex] = Admitted(
                admission.mac, frozenset(admission.addresses), frozenset(admission.prefixes)
            )
        for ifindex, link in self.rtnl.links().items():
            if ifindex in actual.taps:
                actual.taps[ifindex].group = link.group
            elif link.group & GROUP_MASK == self.guard.group_base:
                actual.foreign_groups[ifindex] = link.group
        for neighbour in self.rtnl.neighbours():
            tap = actual.taps.get(neighbour.ifindex)
            if tap is not None:
                tap.neighbours |= {(neighbour.address, neighbour.mac)}
        for address in self.rtnl.tap_addresses():
            tap = actual.taps.get(address.ifindex)
            if tap is not None:
                tap.gateway = tap.sysctls = True  # written together; sysctls are audited on a timer

    def _read_routes(self, actual: Actual) -> None:
        extra = []
        for route in sorted(self.rtnl.routes()):
            if route.prefix in actual.routes:
                extra.append(route)
            else:
                actual.routes[route.prefix] = route
        actual.extra_routes = tuple(extra)

    # -- write ----------------------------------------------------------------------------------------------------

    def apply(self, todo: Plan, actual: Actual) -> list[Refused]:
        """Carries out the plan, in its order. What is refused stops only what depends on it."""
        refused = self._links(todo.close, actual)
        refused += self._filter(todo.filter, actual)
        blocked = {op.ifindex for op in todo.filter if isinstance(op, Admit)} - {
            ifindex for ifindex, tap in actual.taps.items() if tap.addresses or tap.prefixes
        }
        opening: list[LinkOp] = []
        for op in todo.open:
            if isinstance(op, SetGroup) and (op.ifindex in blocked or op.group not in actual.classes):
                refused.append(self._not_opened(op.ifindex, refused))
            else:
                opening.append(op)
        refused += self._links(opening, actual)
        refused += self._filter(todo.collect, actual)
        actual.extra_routes = ()
        return refused

    def _not_opened(self, ifindex: int, refused: Sequence[Refused]) -> Refused:
        why = refused[-1].message if refused else "its class of policies is not in the kernel"
        return Refused(self._tap_name(ifindex), why, Dirty(taps={ifindex}))

    def _tap_name(self, ifindex: int) -> str:
        link = self.rtnl.link(ifindex)
        return f"tap {link.name}" if link is not None else f"tap #{ifindex}"

    def _links(self, ops: Sequence[LinkOp], actual: Actual) -> list[Refused]:
        refused = []
        batch: list[Operation] = []
        for op in ops:
            if not isinstance(op, PutSysctls):
                batch.append(op)
                continue
            try:
                sysctl.write_all(sysctl.tap_sysctls(op.name, self.ipv6))
            except OSError as error:
                refused.append(Refused(f"tap {op.name}", f"sysctl: {error}", Dirty(taps={op.ifindex})))
            else:
                actual.taps.setdefault(op.ifindex, Admitted()).sysctls = True
        failures = self.rtnl.change(batch) if batch else []
        failed = {id(f.operation) for f in failures}
        for done in batch:
            if id(done) not in failed:
                _record_link(done, actual)
        return refused + [self._refusal(f) for f in failures]

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
            transaction = self.table.transaction()
            for number, op in enumerate(pending):
                _write(transaction, op, number)
            try:
                transaction.commit()
            except TransactionRefused as refusal:
                if not isinstance(refusal.label, int):
                    return refused + [Refused(_object(op), refusal.message, _scope(op)) for op in pending]
                bad = pending[refusal.label]
                refused.append(Refused(_object(bad), refusal.message, _scope(bad)))
                rest = list(without(pending, bad, actual))
                gone = [op for op in pending if op is not bad and op not in rest]
                refused += [Refused(_object(op), f"rests on {_object(bad)}", _scope(op)) for op in gone]
                pending = rest
                continue
            for op in pending:
                _record_filter(op, actual, self)
            break
        return refused


def without(ops: Sequence[FilterOp], bad: FilterOp, actual: Actual) -> Iterator[FilterOp]:
    """The operations that can stand without `bad`. What the kernel still has in its last good form stands."""
    sets: set[str] = set()
    chains: set[str] = set()
    dropped: list[FilterOp] = [bad]
    before = 0
    while len(dropped) != before:
        before = len(dropped)
        sets |= {op.name for op in dropped if isinstance(op, AddSet)}
        chains |= {op.name for op in dropped if isinstance(op, PutChain) and op.name not in actual.chains}
        dropped += [op for op in ops if op not in dropped and _rests_on(op, sets, chains)]
    yield from (op for op in ops if op not in dropped)


def _rests_on(op: FilterOp, sets: set[str], chains: set[str]) -> bool:
    match op:
        case AddMembers(name) | DelMembers(name) | FlushSet(name):
            return name in sets
        case PutChain(_, rules):
            jumps = {r.verdict.chain for r in rules if isinstance(r.verdict, Jump)}
            asked = {m.set for r in rules for m in r.matches if isinstance(m, InSetMatch)}
            return bool(jumps & chains or asked & sets)
        case PutClass(_, class_chains):
            return bool(chains.intersection(class_chains))
    return False


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
            transaction.put_class(number, chains.egress, chains.ingress, label)
        case Admit():
            transaction.admit(Admission(*op), label)
        case Expel():
            transaction.expel(Admission(*op), label)
        case Exempt(ifindex, on):
            transaction.exempt(ifindex, on, label)
        case Sweep(strays):
            transaction.sweep(strays, label)  # type: ignore[arg-type]  # what read() returned, handed back
        case DelClass(number):
            transaction.delete_class(number, label)
        case DelChain(name):
            transaction.delete_chain(name, label)
        case DelSet(name):
            transaction.delete_set(name, label)


def _object(op: FilterOp) -> str:
    match op:
        case PutChain(name) | DelChain(name):
            return f"chain {name}"
        case PutClass(number) | DelClass(number):
            return f"class {number:#x}"
        case Admit(ifindex) | Expel(ifindex) | Exempt(ifindex):
            return f"tap #{ifindex}"
        case Sweep():
            return "stray elements"
    return f"set {op.name}"


def _scope(op: FilterOp) -> Dirty:
    match op:
        case PutChain(name) | DelChain(name):
            return Dirty(chains={name})
        case Admit(ifindex) | Expel(ifindex):
            return Dirty(taps={ifindex})
        case AddMembers(name) | DelMembers(name) | FlushSet(name):
            return Dirty(refill={name})
        case AddSet(name) | DelSet(name):
            return Dirty(sets={name})
    return Dirty()


def _record_filter(op: FilterOp, actual: Actual, kernel: Kernel) -> None:
    match op:
        case AddSet(name, spec):
            actual.sets[name] = spec
        case DelSet(name):
            del actual.sets[name]
        case PutChain(name, rules):
            actual.chains[name] = kernel.fingerprints(rules)
        case DelChain(name):
            del actual.chains[name]
        case PutClass(number, chains):
            actual.classes[number] = chains
        case DelClass(number):
            del actual.classes[number]
        case Admit(ifindex, mac, addresses, prefixes):
            tap = actual.taps.setdefault(ifindex, Admitted())
            tap.mac, tap.addresses, tap.prefixes = mac, frozenset(addresses), frozenset(prefixes)
        case Expel(ifindex):
            tap = actual.taps[ifindex]
            tap.mac, tap.addresses, tap.prefixes = b"", frozenset(), frozenset()
            if not (tap.group or tap.gateway or tap.neighbours):
                del actual.taps[ifindex]
        case Exempt(ifindex, on):
            actual.exempt = actual.exempt | {ifindex} if on else actual.exempt - {ifindex}
        case Sweep():
            actual.strays = frozenset()


def _record_link(op: Operation, actual: Actual) -> None:
    match op:
        case SetGroup(ifindex, number):
            if ifindex in actual.taps or number:
                actual.taps.setdefault(ifindex, Admitted()).group = number
            actual.foreign_groups.pop(ifindex, None)
        case Replace(_, new):
            actual.routes[new.prefix] = new
        case Add(Route() as route):
            actual.routes[route.prefix] = route
        case Delete(Route() as route):
            if actual.routes.get(route.prefix) == route:
                del actual.routes[route.prefix]
        case Add(Neighbour(ifindex, address, mac)):
            tap = actual.taps.setdefault(ifindex, Admitted())
            tap.neighbours = frozenset({n for n in tap.neighbours if n[0] != address} | {(address, mac)})
        case Delete(Neighbour(ifindex, address, mac)):
            if ifindex in actual.taps:
                actual.taps[ifindex].neighbours -= {(address, mac)}
        case Add(TapAddress(ifindex)):
            actual.taps.setdefault(ifindex, Admitted()).gateway = True
        case Delete(TapAddress(ifindex)):
            if ifindex in actual.taps:
                actual.taps[ifindex].gateway = False

