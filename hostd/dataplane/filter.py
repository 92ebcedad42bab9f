# Owns: what a packet filter of this host is to hostd, and which of the two it is: nf_tables (nft/) or iptables-legacy
# with ipset (iptables/). Imports only the one that is asked for: the other costs memory.
from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..compiler.ruleset import Guard, Rule, SetKind, SetSpec
from .nft.admission import Admission
from .nft.counters import Counts
from .nft.elements import Member
from .nft.reading import Actual

NFTABLES, IPTABLES = "nftables", "iptables"
_LEGACY = Path("/proc/net/ip_tables_names"), Path("/proc/net/ip6_tables_names")  # the tables that have been made


class Transaction(Protocol):
    """One change. Operations are labelled: TransactionRefused names the label of the one that was refused."""

    def add_set(self, name: str, spec: SetSpec, label: Hashable) -> None: ...
    def delete_set(self, name: str, label: Hashable) -> None: ...
    def flush_set(self, name: str, label: Hashable) -> None: ...
    def add_members(self, name: str, kind: SetKind, members: Iterable[Member], label: Hashable) -> None: ...
    def delete_members(self, name: str, kind: SetKind, members: Iterable[Member], label: Hashable) -> None: ...
    def put_chain(self, name: str, rules: Sequence[Rule], label: Hashable) -> None: ...
    def delete_chain(self, name: str, label: Hashable) -> None: ...
    def put_class(self, group: int, from_chain: str, to_chain: str, label: Hashable) -> None: ...
    def delete_class(self, group: int, label: Hashable) -> None: ...
    def admit(self, admission: Admission, label: Hashable) -> None: ...
    def expel(self, admission: Admission, label: Hashable) -> None: ...
    def exempt(self, ifindex: int, on: bool, label: Hashable) -> None: ...
    def sweep(self, strays: Iterable[Any], label: Hashable) -> None: ...
    def commit(self) -> None: ...


class PacketFilter(Protocol):
    """For one thread, in the network namespace it was made in."""

    @property
    def port(self) -> int:
        """Netlink port that our changes of nf_tables come from."""

    def load(self, exempt: Iterable[int] = ()) -> bool:
        """The guard stands; True if anything had to be written for it."""

    def stands(self) -> bool: ...
    def read(self) -> Actual: ...
    def transaction(self) -> Transaction: ...
    def fingerprints(self, rules: Sequence[Rule]) -> tuple[str, ...]:
        """What read() gives for a chain of these rules."""

    def counters(self, chains: Collection[str] | None = None) -> Counts: ...
    def pieces(self, admission: Admission) -> frozenset[Hashable]:
        """What a sweep takes to take this away."""

    def heard_by(self, listen: Callable[[bool], None]) -> None:
        """Who of ours listens to the kernel, to be turned off and on: it need not hear what we write."""

    def changed(self) -> bool:
        """Somebody else changed something, and no notification tells; cheap enough for several times a second."""

    def settled(self) -> None:
        """What is there now is what is to be."""

    # To follow the other packet filter on a live host: all is loaded asleep, then wakes, then the other goes.
    asleep: bool

    def prime(self, classes: Mapping[int, tuple[str, str]], exempt: Iterable[int]) -> None:
        """The device groups that taps have from the other, and whom it lets be, before anything else is loaded."""

    def wake(self) -> None:
        """From now on packets are asked."""

    def remove(self) -> None:
        """All of it, and nothing else."""

    def close(self) -> None: ...


def is_there(kind: str) -> bool:
    """Something of ours stands in this packet filter."""
    if kind == IPTABLES:
        if not any(path.exists() and "security" in path.read_text().split() for path in _LEGACY):
            return False
        from .iptables.table import IptablesFilter

        return IptablesFilter.is_there()
    from .nft.table import is_owned

    try:
        return is_owned() is not None
    except OSError:
        return False  # no nf_tables in this kernel


def opened(kind: str, guard: Guard, owned: bool, bridges: Callable[[], Collection[str]]) -> PacketFilter:
    if kind == IPTABLES:
        from .iptables.table import IptablesFilter

        return IptablesFilter(guard, bridges)
    from .nft.table import NftTable

    return NftTable(guard, owned)
