# Owns: the door to ipset: one held netlink socket. Messages are not one transaction: what order they come in is the
# caller's care (transaction.py). One thread.
from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

from ...compiler.ruleset import SetKind, SetSpec
from ..netlink import NETLINK_NETFILTER, NLM_F_ACK, KernelRefused, Message, NetlinkSocket, Refusal, message
from . import ipset
from .ipset import Header, Member, Pair
from .names import OURS

_ENOENT = 2


class Task(NamedTuple):
    """One message to ipset, and whose it is."""

    label: Hashable
    what: str  # for people
    kind: int
    body: bytes

    @property
    def set(self) -> str:
        return ipset.name_of(self.body)


class SetsRefused(Exception):
    """That task was refused; those before it are done, those behind it may be."""

    def __init__(self, task: Task, refusal: Refusal) -> None:
        words = ipset.ERRORS.get(refusal.errno) or str(refusal)
        super().__init__(f"{task.what}: {words}")
        self.task, self.refusal, self.words = task, refusal, words


class Sets:
    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER)
        self.touched: set[str] = set()  # sets that were written to, for who watches them

    def close(self) -> None:
        self._socket.close()

    @property
    def port(self) -> int:
        return self._socket.port

    def carry_out(self, tasks: Sequence[Task]) -> None:
        """In order. Raises SetsRefused, OSError."""
        if not tasks:
            return
        first = self._socket.reserve(len(tasks))
        last = len(tasks) - 1
        batch = b"".join(
            message(ipset.SUBSYSTEM | task.kind, NLM_F_ACK if number == last else 0, first + number, task.body)
            for number, task in enumerate(tasks)
        )
        refused = self._socket.exchange(batch, first + last)
        self.touched.update(task.set for task in tasks)
        if refused:
            raise SetsRefused(tasks[max(0, min(last, refused[0].seq - first))], refused[0])

    # -- read -----------------------------------------------------------------------------------------------------

    def headers_raw(self, name: str = "") -> dict[str, bytes]:
        """Of all sets of ours, or of one: differ when a set or the number of its members does, not by who asks it."""
        replies = self._dump(ipset.dump_request(name, headers=True))
        found = ((ipset.name_of(reply.body), reply.body) for reply in replies)
        return {own: ipset.unreferenced(body) for own, body in found if own.startswith(OURS)}

    def headers(self) -> dict[str, Header]:
        found = (ipset.header(reply.body) for reply in self._dump(ipset.dump_request(headers=True)))
        return {head.name: head for head in found if head is not None}

    def members(self, name: str, kind: SetKind) -> Collection[Member]:
        return ipset.members(kind, self._bodies(name))

    def pairs(self, name: str) -> list[Pair]:
        return list(ipset.pairs(self._bodies(name)))

    def contains(self, name: str, address: bytes) -> bool:
        """Raises OSError: no such set, or it is of the other family."""
        body = ipset.message_head(name) + ipset.one(address)
        try:
            self._socket.ask(ipset.SUBSYSTEM | ipset.TEST, body)
        except KernelRefused as refused:
            if refused.errno == ipset.NOT_IN:
                return False
            raise
        return True

    def _bodies(self, name: str) -> list[bytes]:
        return [reply.body for reply in self._dump(ipset.dump_request(name))]

    def _dump(self, body: bytes) -> list[Message]:
        try:
            return self._socket.dump(ipset.SUBSYSTEM | ipset.LIST, body)
        except KernelRefused as refused:
            if refused.errno == _ENOENT:
                return []
            raise


# -- tasks ------------------------------------------------------------------------------------------------------------


def creating(name: str, spec: SetSpec, label: Hashable = None) -> Task:
    return Task(label, f"add set {name}", ipset.CREATE, ipset.of_spec(name, spec))


def creating_pairs(name: str, version: int, size: int) -> Task:
    return Task(None, f"add set {name}", ipset.CREATE, ipset.create(name, ipset.PAIRS, version, size, 1024))


def destroying(name: str, label: Hashable = None) -> Task:
    return Task(label, f"delete set {name}", ipset.DESTROY, ipset.message_head(name))


def flushing(name: str, label: Hashable = None) -> Task:
    return Task(label, f"empty set {name}", ipset.FLUSH, ipset.message_head(name))


def changing(name: str, kind: SetKind, members: Iterable[Member], add: bool, label: Hashable) -> list[Task]:
    what = f"{'add members to' if add else 'delete members of'} set {name}"
    head, verb = ipset.message_head(name), ipset.ADD if add else ipset.DEL
    return [Task(label, what, verb, head + body) for body in ipset.elements(kind, members)]


def changing_pairs(name: str, pairs: Sequence[Pair], add: bool, label: Hashable) -> list[Task]:
    what = "admit endpoint" if add else "expel endpoint"
    head, verb = ipset.message_head(name), ipset.ADD if add else ipset.DEL
    return [Task(label, what, verb, head + body) for body in ipset.pair_elements(pairs)]



def constant_kind(version: int) -> SetKind:
    return SetKind.NET4 if version == 4 else SetKind.NET6


def constant_spec(version: int, count: int) -> SetSpec:
    return SetSpec(constant_kind(version), count)
