# Owns: the decisions of a running hostd: what each hook, libvirt event, dispatcher message and kernel notification
# means for this host's endpoints, and when the kernel is settled. One thread. Touches the world only through its
# parts (kernel, feed, journal); `now` is monotonic seconds.
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from slash32.journal import fields
from slash32.model import Endpoint, EndpointKey
from slash32.sync import Replica
from slash32.tag import Domain, Nic, quote
from slash32.wire import Failure

from .change.settle import Settler
from .compiler.calc import Calculation
from .compiler.desired import Dirty
from .guests.claims import Claims, reportable
from .guests.coming import Coming
from .guests.starting import Answer, Waiting, cannot_come, conflict, outside
from .state import Local, Locals, Phase, isolate_ungranted, without_carrier

log = logging.getLogger("slash32.hostd")

class Feed(Protocol):
    """The dispatcher, as hostd.session.feed has it."""

    @property
    def connected(self) -> bool: ...
    @property
    def in_sync(self) -> bool: ...
    @property
    def trouble(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def key_trouble(self) -> str: ...
    @property
    def replica(self) -> Replica: ...
    def claim(self, endpoint: Endpoint) -> int: ...
    def expect(self, endpoint: Endpoint) -> int: ...
    def release(self, key: EndpointKey) -> int: ...
    def report(self, endpoints: Iterable[Endpoint]) -> int: ...
    def ack(self, revision: int, failures: Iterable[Failure]) -> None: ...


@dataclass(slots=True)
class Exemptions:
    """Untagged guests that ran when the package was first installed: (domain uuid, MAC) -> ifindex once seen."""

    listed: set[EndpointKey] = field(default_factory=set)
    seen: dict[EndpointKey, int] = field(default_factory=dict)


class Agent:
    """What hostd does with what it is told. `settle()` after each batch of inputs brings the kernel up to date."""

    def __init__(self, calc: Calculation, settler: Settler, feed: Feed | None, guard_prefixes: tuple[str, ...]) -> None:
        self.calc = calc
        self.locals: Locals = calc.locals
        self.settler = settler
        self.feed = feed
        self.guard_prefixes = guard_prefixes
        self.claims = Claims(calc.locals)
        self.coming = Coming()
        self.exempt = Exemptions()
        self.dirty = Dirty()
        self.changed: set[EndpointKey] = set()  # to be written to the journal
        self.remember: Callable[[set[EndpointKey]], None] = lambda _: None  # the journal, once there is one
        self.knows = True  # what runs here; a host that remembers nothing must look first (`everything_seen`)
        self.generation = 0  # moves on whenever an endpoint or what is said of it changes
        self.held = ""  # why the dispatcher's word is not followed, if it is not
        self._waiting = Waiting()
        self._revision: int | None = None  # to be acknowledged once settled
        self._told: list[Failure] = []  # with the last acknowledgement

    # -- libvirt's hooks ----------------------------------------------------------------------------------------

    def prepare(self, domain: Domain, answer: Answer, now: float) -> None:
        """Check and reserve. Refuses with one line what could not be connected as its tag says."""
        elsewhere = None if self._reachable() else self.calc
        refusal = outside(domain, self.guard_prefixes) or conflict(domain, self.locals, elsewhere)
        if refusal is not None:
            answer(1, refusal)
            return
        keys = set()
        for endpoint, _ in domain.endpoints:
            local = self.locals.get(endpoint.key)
            if local is not None and local.phase is Phase.INCOMING:
                continue
            if local is None:
                self._put(Local(endpoint, domain.driver, Phase.RESERVED))
            else:  # it ended: what it ran on is not its own any more, nor what it had with another tag
                same = local.accepted if local.accepted == endpoint else None
                self._put(replace(local, endpoint=endpoint, phase=Phase.RESERVED, carrier=None, accepted=same))
            if local is None or local.accepted != endpoint:
                keys.add(endpoint.key)
        self.claim_due(now)
        if not keys or not self._reachable():
            answer(0, "")
            return
        self._waiting.add(keys, answer, now)

    def incoming(self, domain: Domain, answer: Answer, now: float) -> None:
        """A live migration begins: what the guest needs comes first, but neither route nor claim before it runs here.
        One that this host could not connect then is refused: it runs on where it is."""
        refusal = outside(domain, self.guard_prefixes) or conflict(domain, self.locals)
        if refusal is None and domain.endpoints and not self._reachable():
            refusal = cannot_come(domain)
        if refusal is not None:
            answer(1, refusal)
            return

        def told(code: int, message: str) -> None:
            if code:  # libvirt tells no more of it
                self._forget_incoming(domain.uuid)
            answer(code, message)

        if domain.endpoints:
            self._waiting.add_coming(domain, told, now)
        else:
            answer(0, "")
        for endpoint, _ in domain.endpoints:
            self._put(Local(endpoint, domain.driver, Phase.INCOMING))
            self._expect(endpoint)

    def _forget_incoming(self, uuid: str) -> None:
        for local in self.locals.of_domain(uuid):
            if local.phase is Phase.INCOMING:
                self._remove(local)

    def _expect(self, endpoint: Endpoint) -> None:
        if self.feed is not None:
            self.coming.asked(self.feed.expect(endpoint), endpoint)

    def started(self, domain: Domain, answer: Answer, now: float) -> None:
        """The taps are named: program them, and answer when the kernel has it."""
        for endpoint, nic in domain.endpoints:
            if nic.target is not None:
                self._carry(endpoint, nic, domain.driver)
        self._exempt_if_listed(domain)
        self.claim_due(now)
        problems = self.settle()
        mine = [p for e, _ in domain.endpoints if (p := self._problem_of(e.key, problems))]
        answer(1 if mine else 0, mine[0] if mine else "")

    def stopped(self, uuid: str) -> None:
        """The guest is gone from this host: withdraw; its claims go with `released`."""
        for local in self.locals.of_domain(uuid):
            self._put(without_carrier(local))

    def released(self, uuid: str) -> None:
        for local in self.locals.of_domain(uuid):
            self._remove(local)
        self._guard_again(uuid)

    def _guard_again(self, uuid: str) -> None:
        for key in [k for k in self.exempt.seen if k.uuid == uuid]:
            del self.exempt.seen[key]

    # -- what libvirt shows ---------------------------------------------------------------------------------------

    def seen(self, domain: Domain, migrating: bool, now: float) -> None:
        """The whole truth about one active guest. One that is still on its way here stays incoming."""
        present = set()
        for endpoint, nic in domain.endpoints:
            present.add(endpoint.key)
            local = self.locals.get(endpoint.key)
            if local is None or nic.target is not None:
                self._carry(endpoint, nic, domain.driver, runs=not migrating)
        for local in self.locals.of_domain(domain.uuid):
            if local.endpoint.key not in present:
                self._remove(local)
        if not migrating:
            self.runs(domain.uuid, now)  # also where the event that said so was missed
        self._exempt_if_listed(domain)
        self._isolate_if_alone()
        self.claim_due(now)

    def bad_tag(self, uuid: str, message: str) -> None:
        """A running guest was given a tag that is wrong: the last good one stays."""
        for local in self.locals.of_domain(uuid):
            self._say(replace(local, problem=message))
        log.warning("%s", message, extra=fields(uuid=uuid))

    def runs(self, uuid: str, now: float) -> None:
        """The guest executes here: an incoming one has arrived, and its addresses with it."""
        for local in self.locals.of_domain(uuid):
            if local.phase is Phase.INCOMING:
                self.claims.arrived(local.endpoint.key)
                self._put(replace(local, phase=Phase.ARRIVED if local.carrier else Phase.RESERVED))
        self._isolate_if_alone()
        self.claim_due(now)

    def migrated_away(self, uuid: str) -> None:
        """Suspended for the last step of a migration: the addresses are the destination's from now on."""
        for local in self.locals.of_domain(uuid):
            self._remove(local, keep=False)

    def link_gone(self, ifindex: int) -> None:
        """A guest ended, or a NIC was unplugged; whoever gets the name of the tap next is somebody else."""
        local = self.locals.carried_by(ifindex)
        if local is not None:
            self._put(without_carrier(local))
        self.dirty.merge(self.settler.link_gone(ifindex))

    def scanned(self, driver: str, uuids: frozenset[str], beginning: Callable[[str], bool]) -> None:
        """A full scan: what it does not list is gone, but for guests whose start is under way."""
        for local in list(self.locals):
            uuid = local.endpoint.key.uuid
            if local.driver == driver and uuid not in uuids and not beginning(uuid):
                self._remove(local)

    # -- the dispatcher -------------------------------------------------------------------------------------------

    def connected(self, now: float) -> None:
        self.claims.lost()
        self.coming.lost()
        for local in [x for x in self.locals if x.phase is Phase.KEPT]:
            self._remove(local, keep=False)  # the report says so
        if self.knows:
            self._report(now)

    def everything_seen(self, now: float) -> None:
        """libvirt was scanned: from now on what is not known does not run. A report before would release it all."""
        if not self.knows:
            self.knows = True
            if self.feed is not None and self.feed.connected:
                self._report(now)

    def _report(self, now: float) -> None:
        assert self.feed is not None
        endpoints = reportable(self.locals)
        self.claims.asked(self.feed.report(endpoints), endpoints, now)
        for local in [x for x in self.locals if x.phase is Phase.INCOMING]:
            self._expect(local.endpoint)

    def disconnected(self) -> None:
        self.claims.lost()
        self.coming.lost()
        self._waiting.give_up()
        self._isolate_if_alone()

    def applied(self, revision: int, dirty: Dirty) -> None:
        """The world changed (the caller has updated it): acknowledged once the kernel has it."""
        if self.dirty:
            self.dirty.merge(dirty)
        else:
            self.dirty = dirty
        self._revision = revision
        self.held = ""
        self.claims.fleet_changed()

    def answered(self, seq: int, refused: dict[EndpointKey, str], now: float) -> None:
        coming = self.coming.answered(seq)
        if coming is not None:
            self._may_come(coming, refused.get(coming.key, ""))
            return
        for endpoint, message in self.claims.answered(seq, refused, now):
            local = self.locals.get(endpoint.key)
            if local is None:
                continue
            phase = Phase.LIVE if local.phase is Phase.ARRIVED else local.phase
            if not message:
                self._put(replace(local, phase=phase, accepted=endpoint, problem=""))
            elif local.accepted == endpoint or phase is not local.phase:
                self._put(replace(local, phase=phase, accepted=None, problem=message))  # it was ours and is no more
            else:
                self._say(replace(local, problem=message))
            if message and message != local.problem:
                log.warning("%s: %s", quote(endpoint.domain), message, extra=_about(endpoint))
            if local.endpoint == endpoint:  # else it was re-tagged meanwhile, and that is still to be answered
                self._waiting.answered(local.endpoint, message)

    def _may_come(self, endpoint: Endpoint, refusal: str) -> None:
        local = self.locals.get(endpoint.key)
        if local is None or local.endpoint != endpoint or local.phase is not Phase.INCOMING:
            return
        if refusal:
            log.warning("%s: cannot come here: %s", quote(endpoint.domain), refusal, extra=_about(endpoint))
            self._say(replace(local, problem=refusal))
        self._waiting.answered(endpoint, refusal)

    def claim_due(self, now: float) -> None:
        if self.feed is None or not self._reachable():
            return
        for endpoint in self.claims.due(now):
            self.claims.asked(self.feed.claim(endpoint), [endpoint], now)

    # -- time -----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        self._waiting.expire(now)
        if self.claims.overdue(now):
            self._isolate_if_alone(overdue=True)
        self.claim_due(now)

    def settle(self) -> list[Failure]:
        """Bring the kernel to what is desired; acknowledge what the dispatcher sent."""
        self.write_down()
        dirty, self.dirty = self.dirty, Dirty()
        self.calc.desired.exempt = frozenset(self.exempt.seen.values())
        failures = self.settler.settle(dirty)
        self._acknowledge(failures)
        return failures

    def resync(self) -> list[Failure]:
        """The whole kernel is compared with what is desired."""
        self.write_down()
        return self.settler.resync()

    def notifications_lost(self) -> list[Failure]:
        for carrier in [local.carrier for local in self.locals if local.carrier is not None]:
            link = self.settler.kernel.link(carrier.ifindex)
            if link is None or link.name != carrier.tap:
                self.link_gone(carrier.ifindex)
        return self.resync()

    def write_down(self) -> None:
        """On disk before it is in the kernel."""
        if self.changed:
            changed, self.changed = self.changed, set()
            self.remember(changed)

    def knows_all(self) -> bool:
        """The dispatcher was heard, also about what was asked of it: what is not desired now need not be there."""
        return self.feed is None or (self._reachable() and not self.claims.open)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _acknowledge(self, failures: list[Failure]) -> None:
        """What was sent is in the kernel, but for these; also when one of them was made good, or came later."""
        if self.feed is None or not self._reachable() or (self._revision is None and failures == self._told):
            return
        self.feed.ack(self.feed.replica.revision if self._revision is None else self._revision, failures)
        self._revision, self._told = None, failures

    def _reachable(self) -> bool:
        return self.feed is not None and self.feed.connected and self.feed.in_sync

    def _say(self, local: Local) -> None:
        """Only what is said of it changed."""
        self.generation += 1
        self.locals.put(local)

    def _put(self, local: Local) -> None:
        key = local.endpoint.key
        if self.locals.get(key) != local:
            self.generation += 1
            self.locals.put(local)
            self.changed.add(key)
            self.dirty.merge(self.calc.local_changed(key))

    def _remove(self, local: Local, keep: bool = True) -> None:
        """`keep`: where no dispatcher hears of it, it may come back as it was."""
        key = local.endpoint.key
        if keep and local.accepted == local.endpoint and (self.feed is None or not self.feed.connected):
            self._put(replace(local, phase=Phase.KEPT, carrier=None))
            return
        self.generation += 1
        self.locals.remove(key)
        self.claims.forget(key)
        self.changed.add(key)
        self.dirty.merge(self.calc.local_changed(key))
        if self.feed is not None and self.feed.connected:
            self.feed.release(key)
        self._waiting.answered(local.endpoint, "")

    def _carry(self, endpoint: Endpoint, nic: Nic, driver: str, runs: bool = True) -> None:
        carrier = self.settler.carrier(nic.target) if nic.target is not None else None
        if carrier is not None and not carrier.tap.startswith(self.guard_prefixes):
            words = quote(endpoint.domain), quote(carrier.tap)
            log.warning("%s: tap %s is not guarded: left alone", *words, extra=_about(endpoint))
            carrier = None
        other = self.locals.carried_by(carrier.ifindex) if carrier is not None else None
        if other is not None and other.endpoint.key != endpoint.key:
            words = quote(endpoint.domain), quote(other.endpoint.domain)
            log.warning("%s: its tap carries %s: left alone", *words, extra=_about(endpoint))
            carrier = None
        local = self.locals.get(endpoint.key)
        if local is None:
            phase = Phase.LIVE if runs else Phase.INCOMING
            self._put(Local(endpoint, driver, phase if carrier else Phase.RESERVED, carrier))
            return
        phase = local.phase
        if phase in (Phase.RESERVED, Phase.KEPT):
            phase = Phase.LIVE if carrier is not None else Phase.RESERVED
        problem = "" if local.accepted == endpoint else local.problem
        carrier = carrier or local.carrier
        self._put(replace(local, endpoint=endpoint, phase=phase, carrier=carrier, problem=problem))

    def _isolate_if_alone(self, overdue: bool = False) -> None:
        if overdue or not self._reachable():
            for local in list(isolate_ungranted(self.locals)):
                self._put(local)

    def _exempt_if_listed(self, domain: Domain) -> None:
        if domain.tagged:
            self._guard_again(domain.uuid)
        for nic in domain.nics:
            key = EndpointKey(domain.uuid, nic.mac or "")
            if key in self.exempt.listed and nic.target is not None and not domain.tagged:
                carrier = self.settler.carrier(nic.target)
                if carrier is not None:
                    self.exempt.seen[key] = carrier.ifindex

    def _problem_of(self, key: EndpointKey, failures: list[Failure]) -> str | None:
        """Why the kernel refused this endpoint, if it did."""
        local = self.locals.get(key)
        if local is None or local.connected is None or local.carrier is None:
            return None
        failed = {f.object: f.message for f in failures}
        message = failed.get(f"tap {local.carrier.tap}")
        return f"{quote(local.endpoint.domain)}: the kernel refused it: {message}" if message else None


def _about(endpoint: Endpoint) -> dict[str, dict[str, object]]:
    """For who reads the log by programs."""
    return fields(domain=endpoint.domain, uuid=endpoint.key.uuid, mac=endpoint.key.mac)
