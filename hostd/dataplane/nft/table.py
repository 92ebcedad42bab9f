# Owns: our two nf_tables tables on this host: putting the skeleton up, reading back, opening transactions. Holds one
# netlink socket, which in owned mode also is what keeps others out of the tables. One thread.
from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

from ...compiler.ruleset import Guard, Rule
from ..netlink import NETLINK_NETFILTER, NetlinkSocket
from . import kernel as k
from . import reading
from .admission import Admission
from .counters import Counts, counters
from .reading import Actual, Dump
from .rules import fingerprint
from .shapes import Skeleton
from .skeleton import SKELETONS
from .transaction import NOTHING, Transaction, TransactionRefused
from .unheard import Unheard

_FAMILIES = tuple(SKELETONS)
_OWNED = k.TABLE_OWNER | k.TABLE_PERSIST


def supports_owner_persist() -> bool:
    """Whether this kernel (6.9 and later) has tables that others cannot change and that outlive their owner.

    Asked by a transaction that cannot but fail, so that nothing is written: does it fail for the last thing only?
    """
    socket = NetlinkSocket(NETLINK_NETFILTER)
    try:
        attempt = Transaction(socket, "slash32-probe")
        attempt.table(k.INET, _OWNED)
        attempt.delete_set("not-there", label=True)
        attempt.commit()
    except TransactionRefused as refused:
        return refused.label is True
    finally:
        socket.close()
    return False


def is_owned() -> bool | None:
    """Of which kind our tables are; None: there are none yet."""
    socket = NetlinkSocket(NETLINK_NETFILTER)
    try:
        return reading.persists(socket)
    finally:
        socket.close()


class NftTable:
    """The table `slash32` of the families inet and arp."""

    def __init__(self, guard: Guard, owned: bool = False) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER)
        self._unheard = Unheard(self._socket, NOTHING)
        self._owned = owned
        self.asleep = False  # all is there, but no packet is led there yet: the tables are dormant
        self._skeletons: dict[int, Skeleton] = {family: SKELETONS[family](guard) for family in _FAMILIES}

    def close(self) -> None:
        """In owned mode the tables become orphans: they stay, open to others, until they are adopted."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The netlink port that our changes come from: notifications that name another are somebody else's."""
        return self._socket.port

    def transaction(self) -> Transaction:
        return Transaction(self._socket, unheard=self._unheard.exchange)

    def heard_by(self, listen: Callable[[bool], None]) -> None:
        """Turns whoever of ours listens on and off; it need not hear what we write."""
        self._unheard.listen = listen

    def fingerprints(self, rules: Sequence[Rule]) -> tuple[str, ...]:
        """What read() gives for a chain of these rules."""
        return tuple(fingerprint(rule) for rule in rules)

    @staticmethod
    def pieces(admission: Admission) -> frozenset[Hashable]:
        """What a sweep takes to take this away."""
        return frozenset(admission.elements())

    def changed(self) -> bool:
        """Seldom unsaid: while we wrote very much."""
        return self._unheard.missed

    def settled(self) -> None:
        """What is there now is what is to be."""
        self._unheard.missed = False

    def prime(self, classes: Mapping[int, tuple[str, str]], exempt: Iterable[int]) -> None:
        """The device groups that taps have from the other packet filter; the chains are filled later."""
        change = self.transaction()
        for group, chains in classes.items():
            for chain in chains:
                change.put_chain(chain, (), None)
            change.put_class(group, *chains, None)
        for ifindex in exempt:
            change.exempt(ifindex, True, None)
        change.commit()

    def wake(self) -> None:
        """From now on packets are asked. Raises TransactionRefused."""
        self.asleep = False
        self.load()

    def remove(self) -> None:
        """Both tables, with all that is in them. They sleep first: of a table that goes, the kernel empties one chain
        after another, and packets that are just being asked would meet the guard's drop. Raises TransactionRefused."""
        sleep, remove = self.transaction(), self.transaction()
        for family in _FAMILIES:
            if (table := reading.table_of(self._socket, family)) is not None:
                sleep.table(family, int.from_bytes(table.get(2, b""), "big") | k.TABLE_DORMANT)
                remove.remove_table(family)
        sleep.commit()
        remove.commit()

    def load(self, exempt: Iterable[int] = ()) -> bool:
        """Make the skeleton stand, in one transaction, and say whether anything had to be written.

        Sets, chains, classes and admissions stay where the tables are of the right kind. Where not (owned instead of
        not owned, or the repair is refused), the tables are made anew and read() finds them empty of these.
        `exempt` are interfaces that are to be let be from that transaction on.
        Raises TransactionRefused, with label None: the tables are as they were.
        """
        dumps = self._dumps()
        if self._right(dumps):
            return False
        repair = self.transaction()
        for family, skeleton in self._skeletons.items():
            self._repair(repair, family, skeleton, dumps[family])
        for ifindex in exempt:
            repair.exempt(ifindex, True, None)
        try:
            repair.commit()
        except TransactionRefused:
            self._make_anew(dumps)
        return True

    def read(self) -> Actual:
        """Everything, of one generation. Raises OSError (EINTR) where others change the tables without pause."""
        for before in reading.consistent(self._socket):
            actual = self._read()
            if reading.generation(self._socket) == before:
                return actual
        raise AssertionError("unreachable")

    def counters(self, chains: Collection[str] | None = None) -> Counts:
        """(packets, bytes) of each rule of these chains, or of all, where a rule of the chain counts; (0, 0) of one
        that does not. A chain that is written anew begins at nothing."""
        return counters(self._socket, chains)

    def _read(self) -> Actual:
        dumps = self._dumps()
        inet = dumps[k.INET]
        if inet is None:
            return Actual()
        skeleton = self._skeletons[k.INET]
        sets = reading.set_specifications(inet)
        present = {f: self._present(s, dumps[f]) for f, s in self._skeletons.items()}
        granted, strays = reading.admissions(self._socket, present)
        classes, half_classes = reading.classes(self._socket, present[k.INET])
        exempt, halves = reading.exempted(self._socket, present)
        return Actual(
            skeleton_ok=self._right(dumps),
            chains=reading.of_policies(inet, skeleton),
            sets=sets,
            members={n: reading.members(self._socket, n, s.kind) for n, s in sets.items() if s},
            classes=classes,
            admissions=granted,
            exempt=exempt,
            strays=strays | halves | half_classes,
        )

    @staticmethod
    def _present(skeleton: Skeleton, dumped: Dump | None) -> Skeleton:
        """Without the sets that are missing or of another shape."""
        states = dumped.sets if dumped else {}
        sets = {n: s for n, s in skeleton.sets.items() if reading.set_is(states.get(n), s)}
        return Skeleton(sets, skeleton.chains)

    def _dumps(self) -> dict[int, Dump | None]:
        return {family: reading.dump(self._socket, family) for family in _FAMILIES}

    def _right(self, dumps: dict[int, Dump | None]) -> bool:
        return all(
            dumped is not None and self._ours(dumped) and reading.skeleton_stands(dumped, self._skeletons[family])
            for family, dumped in dumps.items()
        )

    def stands(self) -> bool:
        """The skeleton does, whichever process owns it."""
        dumps = self._dumps()
        return all(
            dumped is not None and self._keeps(dumped) and reading.skeleton_stands(dumped, self._skeletons[family])
            for family, dumped in dumps.items()
        )

    def _ours(self, dumped: Dump) -> bool:
        return dumped.flags == self._flags() and (not self._owned or dumped.owner == self._socket.port)

    def _keeps(self, dumped: Dump | None) -> bool:
        """The table is, or by adoption or waking becomes, of the right kind. The kernel changes no other flag."""
        kept = ~(k.TABLE_OWNER | k.TABLE_DORMANT)
        return dumped is not None and dumped.flags & kept == (k.TABLE_PERSIST if self._owned else 0)

    def _flags(self) -> int:
        return (_OWNED if self._owned else 0) | (k.TABLE_DORMANT if self.asleep else 0)

    def _repair(self, change: Transaction, family: int, skeleton: Skeleton, dumped: Dump | None) -> None:
        if dumped is not None and not self._keeps(dumped):
            change.remove_table(family)
            dumped = None
        change.table(family, self._flags())
        if dumped is not None and reading.skeleton_stands(dumped, skeleton):
            return
        if dumped is not None:
            _clear(change, family, skeleton, dumped)
        kept = dumped.sets if dumped else {}
        for name, shape in skeleton.sets.items():
            if not reading.set_is(kept.get(name), shape):
                change.declare_set(family, name, shape)
        for name, chain in skeleton.chains.items():
            if chain.filled:
                change.add_chain(family, name)
            else:
                change.write_chain(family, name, chain.rules, chain.base)

    def _make_anew(self, dumps: dict[int, Dump | None]) -> None:
        change = self.transaction()
        for family, skeleton in self._skeletons.items():
            if dumps[family] is not None:
                change.remove_table(family)
            self._repair(change, family, skeleton, None)
        change.commit()


def _clear(change: Transaction, family: int, skeleton: Skeleton, dumped: Dump) -> None:
    """Take away what has a name of the skeleton's and cannot be written over; what uses it goes first."""
    ours = [
        name
        for name, chain in skeleton.chains.items()
        if name in dumped.chains and not (chain.filled and reading.chain_hangs(dumped, skeleton, name))
    ]
    for name in ours:
        change.flush_chain(family, name)
    for name in ours:
        if not reading.chain_hangs(dumped, skeleton, name):
            change.remove_chain(family, name)
    for name, shape in skeleton.sets.items():
        if name in dumped.sets and not reading.set_is(dumped.sets[name], shape):
            change.remove_set(family, name)
