# Owns: keeping the kernel as desired: what is believed to be in it, what it refused, when that is tried again, and what
# its notifications undo. Pure but for its door to the kernel (`Kernel`, in hostd.dataplane).
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from slash32.errors import Slash32Error
from slash32.metrics import Histogram
from slash32.net import Address, Prefix
from slash32.policy import Direction
from slash32.wire import Failure

from ..compiler.calc import Calculation
from ..compiler.desired import Actual, Dirty, Member
from ..compiler.forwarding import Link, Neighbour, Route, Way
from ..compiler.names import parts_of, policy_chain
from ..compiler.ruleset import GROUP_MASK, HOST_CHAINS, Rule
from ..revocation.revoke import HOST, Change, Flow, InForce, OwnSocket
from ..revocation.trial import Surroundings, Trial
from ..state import Carrier
from .plan import Limits, Plan, Scope, everything, plan, same_way

_GUARD, _FLOWS = "guard", "flows"
RETRY = 2.0  # seconds until what the kernel refused is tried again
REREAD = 15  # of so many vain retries, one looks first: what is believed to be in the kernel may be wrong


class Refused(NamedTuple):
    """One object the kernel did not take. `scope` is what to plan again."""

    object: str  # for people: "tap vnet3", "chain pi-web", "route 10.0.0.1/32"
    message: str
    scope: Dirty


class Kernel(Protocol):
    """The one door (hostd.dataplane.kernel)."""

    def load(self) -> bool: ...
    def read(self) -> Actual: ...
    def apply(self, todo: Plan, actual: Actual) -> list[Refused]: ...
    def fingerprints(self, rules: tuple[Rule, ...]) -> tuple[str, ...]: ...
    def link(self, name_or_index: str | int) -> Link | None: ...
    def routes(self) -> set[Route]: ...
    def tap_sysctls_hold(self, name: str) -> bool: ...
    def way_to(self, address: Address) -> Way: ...
    def end_sockets(self, of: Collection[OwnSocket]) -> None: ...
    def end_condemned(self, near: Collection[Member], condemned: Callable[[Flow], bool]) -> int: ...


@dataclass(slots=True)
class Counters:
    """For status and for the proof that a resync of a settled host writes nothing."""

    plans: int = 0
    writes: int = 0  # operations handed to the kernel
    resyncs: int = 0
    healed: int = 0  # operations that undid somebody else's change
    ended: int = 0  # tracked flows that a change took the permission from
    refused: int = 0  # objects that the kernel did not take


@dataclass(slots=True)
class Settler:
    kernel: Kernel
    calc: Calculation
    limits: Limits
    guard_prefixes: tuple[str, ...]
    actual: Actual = field(default_factory=Actual)
    refused: dict[str, Refused] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    retried: float = 0.0
    vain: int = 0  # retries in a row after which something was still refused
    contested: set[Prefix] = field(default_factory=set)  # taken from us and taken back, lately
    down: set[int] = field(default_factory=set)  # links that were seen down, by ifindex
    force: InForce = field(default_factory=InForce)
    dispatcher_port: int = 0  # what no host endpoint closes
    owes: Callable[[bool], None] = lambda _: None  # told before flows may have to be ended, and when they are
    clock: Callable[[], float] = lambda: 0.0  # seconds, for the two that follow
    applied: Histogram = field(default_factory=Histogram)  # how long writing took
    resynced: Histogram = field(default_factory=Histogram)  # how long reading and making good took

    def settle(self, dirty: Dirty) -> list[Failure]:
        """Plan within `dirty` and apply. Returns all that is refused at present, not only by this call."""
        desired = self.calc.desired
        if dirty or desired.exempt != self.actual.exempt:
            fingerprints = self._fingerprints(dirty.chains)
            scope = Scope(desired, self.actual, dirty, fingerprints, self.limits)
            todo = plan(scope)
            if self.refused:
                self._forget_refusals(dirty)
            self.counters.plans += 1
            change = self.force.ahead(scope, todo, self.kernel.fingerprints)
            if change:
                self.owes(True)
            refused: list[Refused] = []
            if len(todo):
                self.counters.writes += len(todo)
                begun = self.clock()
                refused = self.kernel.apply(todo, self.actual)
                self.applied.observe(self.clock() - begun)
                self.counters.refused += len(refused)
            self.force.came(scope, todo, [refusal.scope for refusal in refused])
            for refusal in refused:
                self._note(refusal)
            if change:
                self._end_revoked(change)
        return self.failures()

    def _end_revoked(self, change: Change) -> None:
        """Flows that are no longer allowed end before anybody hears that the change is in force. What cannot be ended
        is owed: all flows of these taps are judged anew with each retry."""
        keeping = [p.name for p in self.calc.world.policies.values() if p.keep_established]
        chains = frozenset(of(name, way) for name in keeping for way in Direction for of in (policy_chain, parts_of))
        around = Surroundings(self.kernel.way_to, chains, self.dispatcher_port)
        trial = Trial(change, self.force, self.actual, around)
        taps = {ifindex for ifindex, _ in change.sides}
        try:
            self.counters.ended += self.kernel.end_condemned(trial.near(), trial.condemned)
            self.kernel.end_sockets(trial.sockets)
        except OSError as error:
            self.force.owed |= taps
            self._note(Refused(_FLOWS, f"those no longer allowed go on: {error}", _scope(taps)))
        else:
            self.force.owed -= taps
            self.force.keep(trial.kept)
            self.owes(False)

    def failures(self) -> list[Failure]:
        return [Failure(r.object, r.message) for r in self.refused.values()]

    def resync(self) -> list[Failure]:
        """Read everything, compare everything. Writes nothing where nothing differs.

        Where the kernel cannot be read, or refuses the guard, that is a refusal like others: said, and tried again.
        """
        self.counters.resyncs += 1
        begun = self.clock()
        try:
            repaired = self.kernel.load() and self.counters.resyncs > 1
            taken, self.actual = self.actual.taken, self.kernel.read()
            self.actual.taken = taken
        except (Slash32Error, OSError) as error:
            self.refused[_GUARD] = Refused(_GUARD, str(error), Dirty())
            return self.failures()
        self.refused.clear()  # what still differs is planned, and refused, anew
        dirty = everything(self.calc.desired, self.actual)
        for name in set(dirty.sets) & self.actual.sets.keys():
            if self.calc.desired.sets.get(name) not in (None, self.actual.sets[name]):
                del self.actual.sets[name]  # same name, another shape: cannot be ours
        before = self.counters.writes
        failures = self.settle(dirty)
        self.counters.healed += self.counters.writes - before + repaired
        self.actual.members = None
        self.resynced.observe(self.clock() - begun)
        return failures

    def retry_due(self, now: float) -> bool:
        return bool(self.refused) and now - self.retried >= RETRY

    def retry(self, now: float) -> list[Failure]:
        """Try again what the kernel refused."""
        self.retried = now
        if _GUARD in self.refused or self.vain % REREAD == 1:
            failures = self.resync()
        else:
            dirty = Dirty()
            for refusal in self.refused.values():
                dirty.merge(refusal.scope)
            failures = self.settle(dirty)
        self.vain = self.vain + 1 if failures else 0
        return failures

    def pending(self) -> Plan:
        """What a resync would do, without doing it (`slash32-hostd diff`)."""
        actual = self.kernel.read()
        dirty = everything(self.calc.desired, actual)
        return plan(Scope(self.calc.desired, actual, dirty, self._fingerprints(dirty.chains), self.limits))

    def carrier(self, name: str) -> Carrier | None:
        link = self.kernel.link(name)
        return Carrier(link.name, link.ifindex) if link is not None else None

    # -- what the kernel says happened ----------------------------------------------------------------------------

    def link_seen(self, link: Link) -> Dirty:
        """A guarded link appeared or changed: is its group what we gave it?"""
        dirty = Dirty()
        guarded = link.name.startswith(self.guard_prefixes)
        if not link.up:
            self.down.add(link.ifindex)
        elif link.ifindex in self.down:
            self.down.discard(link.ifindex)
            dirty.routes |= self._lost_routes((link.ifindex,) if guarded else (link.ifindex, 0))
        if not guarded:
            return dirty
        known = self.actual.taps.get(link.ifindex)
        expected = known.group if known is not None else 0
        if link.group == expected:
            self.actual.foreign_groups.pop(link.ifindex, None)
            return dirty
        now = self.kernel.link(link.ifindex)  # notifications are late: what counts is what holds now
        if now is None or now.group == expected:
            return dirty
        if known is not None:
            known.group = now.group
            dirty.taps.add(link.ifindex)
        elif now.group & GROUP_MASK == self.limits.group_base:
            self.actual.foreign_groups[link.ifindex] = now.group
            dirty.taps.add(link.ifindex)
        return dirty

    def _lost_routes(self, ways: tuple[int, ...]) -> set[Prefix]:
        """v4 routes leave a link that goes down, or away, and no notification says so. Of a route to a next hop the
        kernel found the interface by itself (0): it may be any that is no tap."""
        suspects = {prefix for prefix, route in self.actual.routes.items() if route.oif in ways}
        if suspects:
            suspects -= {route.prefix for route in self.kernel.routes()}
        for prefix in suspects:
            del self.actual.routes[prefix]
        return suspects

    def link_gone(self, ifindex: int) -> Dirty:
        """The device took its routes, neighbours and addresses along; our elements for it remain to be removed."""
        dirty = Dirty()
        self.actual.foreign_groups.pop(ifindex, None)
        self.down.discard(ifindex)
        known = self.actual.taps.get(ifindex)
        if known is not None:
            known.neighbours, known.gateway, known.sysctls, known.group = frozenset(), False, False, 0
            dirty.taps.add(ifindex)
        else:
            dirty.routes |= self._lost_routes((0,))
        for prefix in [p for p, route in self.actual.routes.items() if route.oif == ifindex]:
            del self.actual.routes[prefix]
            dirty.routes.add(prefix)
        return dirty

    def route_gone(self, route: Route) -> Dirty:
        dirty = Dirty()
        have = self.actual.routes.get(route.prefix)
        if have is not None and same_way(have, route):
            del self.actual.routes[route.prefix]
            dirty.routes.add(route.prefix)
        return dirty

    def route_lost(self, prefix: Prefix) -> Dirty:
        """Somebody's route took the place of ours: it is taken back at once, and from who insists, with each retry."""
        dirty = Dirty(routes={prefix})
        if self.actual.routes.pop(prefix, None) is None and prefix not in self.actual.taken:
            return dirty
        self.actual.taken.add(prefix)
        if prefix in self.contested:
            self.refused[f"route {prefix}"] = Refused(f"route {prefix}", "somebody replaces it again and again", dirty)
            return Dirty()
        self.contested.add(prefix)
        return dirty

    def route_seen(self, route: Route) -> Dirty:
        """A route with our protocol number: ours, or somebody's who poses as us; then it goes. Where it took the place
        of ours, or stands beside it, the plan puts ours there and takes it away."""
        dirty = Dirty()
        have = self.actual.routes.get(route.prefix)
        if have is None or not same_way(have, route):
            self.actual.routes[route.prefix] = route
            dirty.routes.add(route.prefix)
        return dirty

    def neighbour_gone(self, neighbour: Neighbour) -> Dirty:
        """The kernel does not always say which MAC it had."""
        return self.neighbour_seen(neighbour._replace(mac=b""))

    def neighbour_seen(self, neighbour: Neighbour) -> Dirty:
        """A permanent neighbour that says it is ours, written by somebody else."""
        dirty = Dirty()
        known = self.actual.taps.get(neighbour.ifindex)
        if known is None:
            return dirty
        wrong = {n for n in known.neighbours if n[0] == neighbour.address and n[1] != neighbour.mac}
        if wrong:
            known.neighbours -= wrong
            dirty.taps.add(neighbour.ifindex)
        return dirty

    def gateway_gone(self, ifindex: int) -> Dirty:
        dirty = Dirty()
        known = self.actual.taps.get(ifindex)
        if known is not None and known.gateway:
            known.gateway = False
            dirty.taps.add(ifindex)
        return dirty

    def audit(self) -> Dirty:
        """What sends no notification: some of the taps' sysctls."""
        self.contested.clear()
        dirty = Dirty()
        for ifindex in self.calc.desired.taps:
            dirty.merge(self.sysctls_changed(ifindex))
        return dirty

    def sysctls_changed(self, ifindex: int) -> Dirty:
        tap = self.calc.desired.taps.get(ifindex)
        known = self.actual.taps.get(ifindex)
        dirty = Dirty()
        if tap is not None and known is not None and not self.kernel.tap_sysctls_hold(tap.name):
            known.sysctls = False
            dirty.taps.add(ifindex)
        return dirty

    # -- inside ---------------------------------------------------------------------------------------------------

    def _fingerprints(self, names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        chains = self.calc.desired.chains
        return {name: self.kernel.fingerprints(chains[name]) for name in names if name in chains}

    def _note(self, refusal: Refused) -> None:
        """Of one object several operations may be refused: the first says why, and all are tried again."""
        first = self.refused.setdefault(refusal.object, refusal)
        if first is not refusal:
            first.scope.merge(refusal.scope)

    def _forget_refusals(self, dirty: Dirty) -> None:
        """Those that this plan tries again; what has no scope is tried with whatever needs it."""

        def within(scope: Dirty) -> bool:
            return not scope or bool(
                scope.taps & dirty.taps
                or scope.chains & dirty.chains
                or scope.sets & dirty.sets
                or scope.refill & (dirty.refill | dirty.sets)
                or scope.routes & dirty.routes
            )

        self.refused = {n: r for n, r in self.refused.items() if n == _GUARD or not within(r.scope)}


def _scope(judged: set[int]) -> Dirty:
    """What to plan again, so that the flows of these taps, or of the host, are judged again."""
    return Dirty(taps=judged - {HOST}, chains={*HOST_CHAINS} if HOST in judged else set())
