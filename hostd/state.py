# Owns: what this host knows of its own endpoints: what libvirt runs, which tap carries it, what the dispatcher
# accepted. Pure; the last state on disk is this plus the replica (hostd.journal).
from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from slash32.model import Endpoint, EndpointKey
from slash32.net import Address, Prefix, format_address


class Phase(enum.Enum):
    RESERVED = "reserved"  # prepare: claimed, no tap yet
    INCOMING = "incoming"  # destination of a live migration: ACL yes, route and claim not before the guest runs here
    ARRIVED = "arrived"  # it runs here since a moment ago: claimed, and filtered as before until that is answered
    LIVE = "live"
    KEPT = "kept"  # it ended while no dispatcher could be told: what it was granted is still its own


ELSEWHERE = (Phase.INCOMING, Phase.KEPT)  # not, or not any more, this host's to claim


class Carrier(NamedTuple):
    """The link that carries an endpoint. Names are reused, indexes are not."""

    tap: str
    ifindex: int


@dataclass(frozen=True, slots=True)
class Local:
    """One endpoint of this host."""

    endpoint: Endpoint
    driver: str  # libvirt's: qemu | lxc
    phase: Phase
    carrier: Carrier | None = None
    accepted: Endpoint | None = None  # as the dispatcher last granted it
    problem: str = ""  # why it is not connected, or not as its tag says: one line

    @property
    def connected(self) -> Endpoint | None:
        """What the kernel is to enforce: only what was granted. Isolated (None) where nothing was.

        An incoming guest runs elsewhere, where it was granted; its address comes here with the claim.
        """
        if self.phase in (Phase.INCOMING, Phase.ARRIVED):
            return self.endpoint
        return self.accepted if self.phase is Phase.LIVE else None

    @property
    def is_unclaimed(self) -> bool:
        """To be asked of the dispatcher, as it is now."""
        return self.phase not in ELSEWHERE and self.accepted != self.endpoint


@dataclass(slots=True)
class Locals:
    """All endpoints of this host, by key."""

    by_key: dict[EndpointKey, Local]
    unclaimed: dict[EndpointKey, None] = field(init=False, repr=False, compare=False)  # this host's, and not granted

    def __post_init__(self) -> None:
        self.unclaimed = {key: None for key, local in self.by_key.items() if local.is_unclaimed}

    def __iter__(self) -> Iterator[Local]:
        return iter(self.by_key.values())

    def get(self, key: EndpointKey) -> Local | None:
        return self.by_key.get(key)

    def of_domain(self, uuid: str) -> list[Local]:
        return [local for local in self if local.endpoint.key.uuid == uuid]

    def put(self, local: Local) -> None:
        key = local.endpoint.key
        self.by_key[key] = local
        if local.is_unclaimed:
            self.unclaimed[key] = None
        else:
            self.unclaimed.pop(key, None)

    def remove(self, key: EndpointKey) -> Local | None:
        self.unclaimed.pop(key, None)
        return self.by_key.pop(key, None)

    def conflict(self, endpoint: Endpoint) -> str | None:
        """One line if another endpoint of this host has one of the addresses or prefixes; None if not."""
        for other in self:
            if other.endpoint.key == endpoint.key or other.phase is Phase.KEPT:
                continue
            taken = _overlap(endpoint, other.endpoint)
            if taken is not None:
                return f"{taken} is in use by {other.endpoint.domain!r} on this host: give each guest its own"
        return None

    def verify(self, exists: Callable[[str, int], bool]) -> None:
        """After a start: a carrier that is not there any more (name and ifindex) carries nothing."""
        for local in list(self):
            if local.carrier is not None and not exists(*local.carrier):
                self.put(without_carrier(local))

    def carried_by(self, ifindex: int) -> Local | None:
        return next((x for x in self if x.carrier is not None and x.carrier.ifindex == ifindex), None)


def tagged_again(local: Local, endpoint: Endpoint, carrier: Carrier | None) -> Local:
    """The same endpoint as libvirt shows it now."""
    return replace(local, endpoint=endpoint, carrier=carrier or local.carrier)


def without_carrier(local: Local) -> Local:
    """Its link is gone. One that is still on its way here is not claimed by that."""
    phase = local.phase if local.phase in (Phase.INCOMING, Phase.KEPT) else Phase.RESERVED
    return replace(local, carrier=None, phase=phase)


def isolate_ungranted(locals_: Iterable[Local]) -> Iterator[Local]:
    """Without a dispatcher a re-tagged endpoint may not go on with the rights of its old tag, nor one that has just
    come with those it had elsewhere."""
    for local in locals_:
        came = local.phase is Phase.ARRIVED
        if came or (local.phase is Phase.LIVE and local.accepted not in (None, local.endpoint)):
            why = f"{'arrived' if came else 're-tagged'} while no dispatcher answers: isolated until it does"
            yield replace(local, phase=Phase.LIVE, accepted=None, problem=why)


def _overlap(one: Endpoint, two: Endpoint) -> str | None:
    both: set[Address] = set(one.addresses) & set(two.all_addresses())
    if both:
        return f"address {format_address(min(both))}"
    groups = {s.address: s.group for s in two.shared}
    for shared in one.shared:
        if shared.address in two.addresses or groups.get(shared.address, shared.group) != shared.group:
            return f"address {format_address(shared.address)}"
    prefixes: set[Prefix] = set(one.prefixes) & set(two.prefixes)
    return f"prefix {min(prefixes)}" if prefixes else None
