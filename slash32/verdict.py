# Owns: the specification of what policy means, as a program: one packet in, the verdict and who gave it out. Pure.
# Clarity over speed: the kernel's answer is compared with this one, never the other way round. Whether one rule matches
# one packet is slash32.matching. Not policy, and so not here: what the packet filter's skeleton lets by or drops
# whatever policy says (answers, DHCP and neighbour discovery with the host, forged sources, tunnels to the host, what
# begins no flow: TCP without SYN, ICMP in IPv6 and ICMPv6 in IPv4).
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from slash32 import failsafe
from slash32.matching import Packet, Whereabouts, World, effective_labels, owners, parsed, rule_matches
from slash32.model import Endpoint
from slash32.net import Address
from slash32.policy import (
    ANY_INTERFACE,
    DEFAULT_TIER,
    THE_DEFAULT_TIER,
    Action,
    Direction,
    HostEndpoint,
    Policy,
    Profile,
    Tier,
)

__all__ = [
    "Judge", "Note", "Packet", "Stage", "Verdict", "World", "applicable", "effective_labels", "owners", "steps",
    "verdict", "walk",
]  # fmt: skip


StageKind = Literal["policy", "profile", "tier", "failsafe", "default"]
What = Literal["log", "pass", "would allow", "would pass", "would drop"]
_WOULD: dict[Action, What] = {Action.ALLOW: "would allow", Action.PASS: "would pass", Action.DENY: "would drop"}
Steps = list[tuple[Tier, list[Policy]]]


class Stage(NamedTuple):
    """Who decided at one end: a rule of a policy or profile, a tier's default action, what is always open at host
    endpoints (`failsafe`), or nobody (`default`: dropped; allowed only where a host endpoint's last tier passed what
    the host forwards)."""

    allowed: bool
    direction: Direction
    kind: StageKind
    name: str = ""  # of the policy or profile; of a failsafe what it is for; "*": the host has no such host endpoint
    rule: int | None = None  # index into the policy's rules of this direction
    domain: str = ""  # the guest, or the host endpoint, at which it was decided; the host where it has no "*"
    tier: str = ""  # of a policy, or whose default action it was


@dataclass(frozen=True, slots=True)
class Verdict:
    """`egress` is None where no endpoint owns the source, `ingress` where none owns the destination. `host_egress` and
    `host_ingress`: host endpoints on the way (see `verdict`)."""

    allowed: bool
    egress: Stage | None = None
    ingress: Stage | None = None
    host_egress: Stage | None = None
    host_ingress: Stage | None = None


class Note(NamedTuple):
    """What happened on the way to a verdict without deciding: a rule logged or passed, a tier's default action passed,
    a staged policy would have allowed, passed or dropped (with no policy: its tier's default action would have)."""

    direction: Direction
    domain: str
    what: What
    tier: str = ""
    policy: str = ""  # or, with no tier, the profile; "" where it was the tier's default action
    rule: int | None = None


def applicable(policies: Iterable[Policy], labels: Mapping[str, str], direction: Direction) -> list[Policy]:
    """Those that select an endpoint with these labels in this direction, in the order they are asked in their tier."""
    found = [p for p in policies if direction in p.types and parsed(p.selector).matches(labels)]
    return sorted(found, key=Policy.sort_key)


def steps(
    policies: Iterable[Policy],
    tiers: Iterable[Tier],
    labels: Mapping[str, str],
    direction: Direction,
    staged: bool = False,
) -> Steps:
    """The tiers that an endpoint with these labels meets, in order, each with its policies that apply, in order.
    `staged`: with the staged ones at their places; a tier may then hold nothing else, and is as if absent to the real
    verdict. A tier that nobody defined sorts last and denies."""
    known = {tier.name: tier for tier in tiers} | {DEFAULT_TIER: THE_DEFAULT_TIER}
    found: dict[str, list[Policy]] = {}
    for policy in applicable((p for p in policies if staged or not p.staged), labels, direction):
        found.setdefault(policy.tier, []).append(policy)
    asked = [(known.get(name) or Tier(name), listed) for name, listed in found.items()]
    return sorted(asked, key=lambda step: step[0].sort_key())


def verdict(world: World, packet: Packet) -> Verdict:
    """All who are asked on the way must allow:

    - the source, a guest: its egress; then, where the packet leaves its host, that host's host endpoints (forwarded);
    - the source, a host's own address: that host's host endpoints (local egress);
    - the destination: the host endpoints of its host, where the packet comes from elsewhere (forwarded to a guest, or
      local), then the guest's ingress;
    - a guest to its own host: the host's "*" (local ingress, no failsafes), closed where it has none; a host to its own
      guest: its "*" (local egress, no failsafes), if it has one. Between two guests of a host, within a host: none.

    Where several endpoints share an address, each of them must allow. Where the packet does not say by which interface
    it passes a host, all host endpoints of that host are asked, "*" too, and the most restrictive answers. Host
    endpoints of a guest whose host is not known are not asked. (Always open to a host, and not known here: the
    dispatcher's port.)"""
    return Judge(world).verdict(packet)


def walk(world: World, packet: Packet) -> tuple[Verdict, list[Note]]:
    """The verdict and what came before it, stage after stage."""
    return Judge(world).walk(packet)


class _Place(NamedTuple):
    """Where one end of a packet may be: at a guest, at a host itself (no guest), or outside (neither)."""

    guest: Endpoint | None = None
    host: str = ""  # "": outside, or not known


class _Question(NamedTuple):
    end: Literal["egress", "host_egress", "host_ingress", "ingress"]
    subject: Endpoint | HostEndpoint | None  # None: a host that has nobody to ask, which closes it
    how: Literal["guest", "local", "forward", "own guests", "closed"]
    name: str  # of the subject


class Judge:
    """`verdict` for many packets in one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.who = Whereabouts(world)
        self._steps: dict[object, Steps] = {}

    def verdict(self, packet: Packet) -> Verdict:
        return self.walk(packet)[0]

    def walk(self, packet: Packet) -> tuple[Verdict, list[Note]]:
        notes: list[Note] = []
        answers: dict[str, list[Stage]] = {}
        for question in self._way(packet):
            stage = _Asking(self, packet, question, notes).stage()
            if stage is not None:
                answers.setdefault(question.end, []).append(stage)
        strictest = {end: min(stages, key=lambda stage: stage.allowed) for end, stages in answers.items()}
        return Verdict(all(s.allowed for s in strictest.values()), **strictest), list(dict.fromkeys(notes))

    def steps(self, subject: Endpoint | HostEndpoint, direction: Direction, forward: bool) -> Steps:
        """`forward`: only policies that apply to what a host forwards."""
        labels = effective_labels(subject, self.who.profiles)
        memo = frozenset(labels.items()), direction, forward
        if memo not in self._steps:
            policies = (p for p in self.world.policies if p.apply_on_forward or not forward)
            self._steps[memo] = steps(policies, self.world.tiers, labels, direction, staged=True)
        return self._steps[memo]

    def _way(self, packet: Packet) -> Iterator[_Question]:
        for source in self._places(packet.source):
            for destination in self._places(packet.destination):
                if source.guest:
                    yield _Question("egress", source.guest, "guest", source.guest.domain)
                yield from self._past_hosts(packet, source, destination)
                if destination.guest:
                    yield _Question("ingress", destination.guest, "guest", destination.guest.domain)

    def _places(self, address: Address) -> list[_Place]:
        guests = [_Place(guest, self.world.places.get(guest.key, "")) for guest in self.who.claimants(address)]
        return guests or [_Place(None, host) for host in self.who.hosts(address)] or [_Place()]

    def _past_hosts(self, packet: Packet, source: _Place, destination: _Place) -> Iterator[_Question]:
        if source.host and source.host == destination.host:
            yield from self._at_home(source, destination)
            return
        for each in self._facing(source.host, packet.out_interface):
            yield _Question("host_egress", each, "forward" if source.guest else "local", each.name)
        for each in self._facing(destination.host, packet.in_interface):
            yield _Question("host_ingress", each, "forward" if destination.guest else "local", each.name)

    def _at_home(self, source: _Place, destination: _Place) -> Iterator[_Question]:
        everything = [each for each in self._of(source.host) if each.interface == ANY_INTERFACE]
        if source.guest and not destination.guest:
            for each in everything:
                yield _Question("host_ingress", each, "own guests", each.name)
            if not everything:
                yield _Question("host_ingress", None, "closed", source.host)
        elif destination.guest and not source.guest:
            for each in everything:
                yield _Question("host_egress", each, "own guests", each.name)

    def _facing(self, host: str, interface: str | None) -> list[HostEndpoint]:
        """The host endpoints of that interface; without one, all."""
        there = self._of(host)
        if interface is None:
            return there
        named = [each for each in there if each.interface == interface]
        return named or [each for each in there if each.interface == ANY_INTERFACE and interface != "lo"]

    def _of(self, host: str) -> list[HostEndpoint]:
        return [each for each in self.world.host_endpoints if each.node == host]


class _Asking:
    """One question about one packet."""

    def __init__(self, judge: Judge, packet: Packet, question: _Question, notes: list[Note]) -> None:
        self.judge, self.packet, self.question, self.notes = judge, packet, question, notes
        self.direction = Direction.EGRESS if question.end.endswith("egress") else Direction.INGRESS
        self.staged = True  # staged policies are still looked at

    def stage(self) -> Stage | None:
        """None: nobody is asked."""
        subject, how = self.question.subject, self.question.how
        if subject is None:
            return self._decided(False, "default", ANY_INTERFACE)
        open_for = _failsafe(self.packet, self.direction) if how == "local" else ""
        if open_for:
            return self._decided(True, "failsafe", open_for)
        met = self.judge.steps(subject, self.direction, how == "forward")
        for tier, policies in met:
            stage = self._tier(tier, policies)
            if stage is not None:
                return stage
        if how != "forward":
            return self._profiles(subject.profiles)
        asked = any(not policy.staged for _, policies in met for policy in policies)
        return self._decided(True, "default") if asked else None  # what a host passes on is no profile's business

    def _tier(self, tier: Tier, policies: list[Policy]) -> Stage | None:
        """None: on with the next."""
        for policy in policies:
            action, index = self._first(policy) if self.staged or not policy.staged else (None, None)
            if action is None:
                continue
            if policy.staged:  # would have decided; from here on only what is enforced is asked
                self.staged = False
                self._note(_WOULD[action], tier.name, policy.name, index)
            elif action is Action.PASS:
                self._note("pass", tier.name, policy.name, index)
                return None
            else:
                return self._decided(action is Action.ALLOW, "policy", policy.name, index, tier.name)
        return self._end_of(tier, any(not policy.staged for policy in policies))

    def _end_of(self, tier: Tier, enforced: bool) -> Stage | None:
        """A tier of which only staged policies apply is as if absent, but counts."""
        if tier.default_action is Action.PASS:
            if enforced:
                self._note("pass", tier.name)
            return None
        if enforced:
            return self._decided(False, "tier", tier=tier.name)
        if self.staged:
            self.staged = False
            self._note("would drop", tier.name)
        return None

    def _profiles(self, names: Iterable[str]) -> Stage:
        """Pass ends them: there is nobody left who could allow."""
        known = self.judge.who.profiles
        for profile in (known[name] for name in names if name in known):
            action, index = self._first(profile)
            if action is not None:
                return self._decided(action is Action.ALLOW, "profile", profile.name, index)
        return self._decided(False, "default")

    def _first(self, item: Policy | Profile) -> tuple[Action | None, int | None]:
        """The first rule that matches and is no Log. A staged policy's Log says nothing."""
        for index, rule in enumerate(item.rules(self.direction)):
            if not rule_matches(rule, self.packet, self.judge.who):
                continue
            if rule.action is not Action.LOG:
                return rule.action, index
            if isinstance(item, Profile) or not item.staged:
                self._note("log", "" if isinstance(item, Profile) else item.tier, item.name, index)
        return None, None

    def _decided(
        self, allowed: bool, kind: StageKind, name: str = "", rule: int | None = None, tier: str = ""
    ) -> Stage:
        return Stage(allowed, self.direction, kind, name, rule, self.question.name, tier)

    def _note(self, what: What, tier: str, name: str = "", rule: int | None = None) -> None:
        self.notes.append(Note(self.direction, self.question.name, what, tier, name, rule))


def _failsafe(packet: Packet, direction: Direction) -> str:
    """What for, if it is always open to and from a host."""
    if packet.protocol == 58 and packet.icmp and packet.icmp.type in failsafe.VITAL_ICMP6 and len(packet.source) == 16:
        return "ICMPv6 without which a host has no neighbours"
    for each in failsafe.INBOUND if direction is Direction.INGRESS else failsafe.OUTBOUND:
        port = packet.destination_port
        if packet.protocol == each.protocol and port is not None and each.first <= port <= each.last:
            return each.why
    return ""
