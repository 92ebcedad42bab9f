# Owns: the operations of one change, in the words of filter.Transaction, made into a batch. Nothing is written before
# commit() (steps.py); an endpoint of a known class is nothing but elements of sets.
from __future__ import annotations

import errno
import socket
from collections.abc import Hashable, Iterable, Sequence

from slash32.net import host_prefix

from ...compiler.ruleset import HOST_CHAINS, Rule, SetKind, SetSpec
from ..netlink import Refusal
from ..nft.admission import Admission
from ..nft.transaction import TransactionRefused
from . import steps
from .batch import Batch, Change, Grant, NewClass, Put
from .ipset import Member
from .lines import is_plain
from .names import BEHIND, SOURCE, is_outward, kernel_set, policy_chain
from .steps import Door
from .stray import Stray, StrayClass, StrayExempt, StrayGate, StrayPair


class Transaction:
    """Operations are applied by commit(), once. It is not all or nothing as in nf_tables: what was done before the
    refused operation stays, all of it on the safe side; each operation may be carried out again."""

    def __init__(self, door: Door) -> None:
        self._door, self._known = door, door.known
        self._batch = Batch()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    # -- sets -----------------------------------------------------------------------------------------------------

    def add_set(self, name: str, spec: SetSpec, label: Hashable) -> None:
        kernel_set(name)
        self._count += 1
        self._batch.fresh[name], self._batch.labels[name] = spec, label

    def delete_set(self, name: str, label: Hashable) -> None:
        self._count += 1
        self._batch.gone_sets[name] = label

    def flush_set(self, name: str, label: Hashable) -> None:
        """Take all members away; those that are added again here stay all the time."""
        self._count += 1
        spec = self._batch.fresh.get(name) or self._known.sets.get(name)
        if spec is None:
            raise refused(label, errno.ENOENT, f"empty set {name}")
        now = self._door.sets.members(kernel_set(name), spec.kind)
        self._batch.changes.append(Change(name, spec.kind, now, False, label))

    def add_members(self, name: str, kind: SetKind, members: Iterable[Member], label: Hashable) -> None:
        """Raises ValueError for a member that does not fit the kind."""
        self._count += 1
        change = Change(name, kind, tuple(members), True, label)
        (self._batch.fill if name in self._batch.fresh else self._batch.changes).append(change)

    def delete_members(self, name: str, kind: SetKind, members: Iterable[Member], label: Hashable) -> None:
        self._count += 1
        self._batch.changes.append(Change(name, kind, tuple(members), False, label))

    # -- chains and classes -----------------------------------------------------------------------------------------

    def put_chain(self, name: str, rules: Sequence[Rule], label: Hashable) -> None:
        self._count += 1
        self._batch.puts[policy_chain(name)] = Put(tuple(rules), label)
        self._batch.gone.pop(name, None)

    def delete_chain(self, name: str, label: Hashable) -> None:
        """One of HOST_CHAINS is emptied: the skeleton needs it."""
        if name in HOST_CHAINS:
            self.put_chain(name, (), label)
            return
        self._count += 1
        self._batch.gone[policy_chain(name)] = label
        self._batch.puts.pop(name, None)

    def put_class(self, group: int, from_chain: str, to_chain: str, label: Hashable) -> None:
        if not is_outward(from_chain) or is_outward(to_chain):  # `accept` would lead past the other end's policy
            words = f"by their names {from_chain} and {to_chain} are not what a guest sends and what it receives"
            raise refused(label, errno.EINVAL, f"class {group:#x}", words)
        self._count += 1
        self._batch.classes[group] = NewClass((from_chain, to_chain), label)

    def delete_class(self, group: int, label: Hashable) -> None:
        self._count += 1
        self._batch.classes[group] = NewClass(None, label)

    # -- endpoints --------------------------------------------------------------------------------------------------

    def admit(self, admission: Admission, label: Hashable) -> None:
        """Idempotent. What an older interface of this name was admitted with goes first."""
        self._count += 1
        try:
            tap = socket.if_indextoname(admission.ifindex)
        except OSError as error:
            raise refused(label, error.errno or errno.ENODEV, "admit endpoint") from None
        mine = list(_grants(admission, tap, label))
        kept = {(grant.set, grant.source) for grant in mine}
        owner = owner_of(admission)
        for (name, source), whose in self._known.pairs.get(tap, {}).items():
            if whose != owner and (name, source) not in kept:
                self._batch.expel.append(Grant(name, tap, source, whose, label))
        self._batch.admit += mine

    def expel(self, admission: Admission, label: Hashable) -> None:
        """What by now is another interface's of the same name stays."""
        self._count += 1
        owner = owner_of(admission)
        tap = self._known.taps.get(owner)
        if tap is None:
            return
        have = self._known.pairs.get(tap, {})
        for grant in _grants(admission, tap, label):
            if have.get((grant.set, grant.source)) == owner:
                self._batch.expel.append(grant)

    def exempt(self, ifindex: int, on: bool, label: Hashable) -> None:
        """The guard lets this interface be, whatever its name."""
        self._count += 1
        try:
            tap = socket.if_indextoname(ifindex)
        except OSError as error:
            if on:
                raise refused(label, error.errno or errno.ENODEV, "exempt interface") from None
            return
        if on and not is_plain(tap):
            words = "its name means something else to iptables: rename it"
            raise refused(label, errno.EINVAL, "exempt interface", words)
        self._batch.exempt[tap] = on

    def sweep(self, strays: Iterable[Stray], label: Hashable) -> None:
        """Delete what read() found to belong to nothing whole."""
        self._count += 1
        for stray in strays:
            match stray:
                case StrayPair(name, tap, source):
                    self._batch.expel.append(Grant(name, tap, source, "", label))
                case StrayClass(group):
                    self._batch.classes.setdefault(group, NewClass(None, label))
                case StrayExempt(tap):
                    self._batch.exempt.setdefault(tap, False)
                case StrayGate():
                    self._batch.completes = True

    # -- the end ----------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Raises TransactionRefused, or OSError where the outcome is unknown."""
        if self._count:
            steps.carry_out(self._door, self._batch)


def owner_of(admission: Admission) -> str:
    return f"{admission.ifindex} {admission.mac.hex(':')}"


def _grants(admission: Admission, tap: str, label: Hashable) -> Iterable[Grant]:
    owner = owner_of(admission)
    for address in admission.addresses:
        yield Grant(SOURCE[4 if len(address) == 4 else 6], tap, host_prefix(address), owner, label)
    for prefix in admission.prefixes:
        yield Grant(BEHIND[prefix.version], tap, prefix, owner, label)


def refused(label: Hashable, code: int, what: str, words: str = "") -> TransactionRefused:
    return TransactionRefused(label, Refusal(0, code, words), what)
