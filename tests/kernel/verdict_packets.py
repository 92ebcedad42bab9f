# Owns: the packets that are sent in a random world, chosen so that about half are allowed and as many rules as possible
# decide; and the model's word on each, as far as it is h1's.
from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple

from verdict_worlds import BARE, HOST, KINDS, UP0, UP1, Spot, in_charge, spots, world_of

from slash32.matching import Whereabouts, rule_matches
from slash32.model import Endpoint
from slash32.net import Address
from slash32.policy import Action, Direction, Icmp, Peer, PortRange, Rule
from slash32.rules import WITH_PORTS
from slash32.verdict import Judge, Note, Packet, Verdict, World

PORTS = (22, 53, 79, 80, 81, 179, 442, 443, 444, 445, 1023, 1024, 8079, 8080, 19999, 20000, 49152, 65535)
PACKETS = 160
POOL = 180  # of which they are chosen, besides those that are aimed at rules
WELL = 0.3, 0.7  # so many of a world's packets are allowed
Decider = tuple[str, str, Direction, int]  # "policy" or "profile", name, direction, rule


Ends = dict[int, tuple[list[Spot], list[Spot]]]  # by IP version: places to speak from, and to


class Shot(NamedTuple):
    packet: Packet
    sender: str  # port of the fabric
    receiver: str
    word: bool = False  # the model's
    deciders: frozenset[Decider] = frozenset()  # rules that had a say


@dataclass(frozen=True)
class Case:
    """A world and the packets that are sent in it, each with the model's word on it."""

    seed: int
    world: World
    shots: list[Shot] = field(default_factory=list)

    @property
    def allowed(self) -> float:
        return sum(shot.word for shot in self.shots) / len(self.shots)

    def deciding(self) -> float:
        """Share of the enforced rules that decide at least one packet."""
        rules = list(enforced(self.world))
        decided = set[Decider]().union(*(shot.deciders for shot in self.shots))
        return len(decided.intersection(rules)) / max(1, len(rules))


def enforced(world: World) -> Iterator[Decider]:
    for kind, items in (("policy", world.policies), ("profile", world.profiles)):
        for item in items:  # type: ignore[attr-defined]
            if kind == "profile" or not item.staged:
                for way in Direction:
                    for number, rule in enumerate(item.rules(way)):
                        if rule.action is not Action.LOG:
                            yield kind, item.name, way, number


class _Whereabouts(Whereabouts):
    """As h1 has it: one of those who share an address gets it."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._world = world

    def claimants(self, address: Address) -> list[Endpoint]:
        return in_charge(self._world, super().claimants(address))


class Model:
    """The specification's word, of what h1 is asked."""

    def __init__(self, world: World) -> None:
        self.judge = Judge(world)
        self.judge.who = _Whereabouts(world)

    def judged(self, shot: Shot) -> Shot:
        said, notes = self.judge.walk(shot.packet)
        stages = [stage for stage in _here(said, shot) if stage is not None]
        found = {(s.kind, s.name, s.direction, s.rule) for s in stages if s.kind in ("policy", "profile")}
        found |= {_of_note(note) for note in notes if note.what == "pass" and note.policy}
        return shot._replace(word=all(s.allowed for s in stages), deciders=frozenset(found))  # type: ignore[arg-type]

    def says(self, shot: Shot) -> Verdict:
        return self.judge.verdict(shot.packet)


def _of_note(note: Note) -> Decider:
    return ("policy" if note.tier else "profile"), note.policy, note.direction, note.rule or 0


def _here(said: Verdict, shot: Shot) -> Iterator[object]:
    if shot.sender not in (UP0, UP1):
        yield from (said.egress, said.host_egress)
    if shot.receiver not in (UP0, UP1):
        yield from (said.ingress, said.host_ingress)


def case(seed: int) -> Case:
    """The same for the same seed."""
    chance = random.Random(seed)
    while True:
        made = case_of(seed, world_of(chance), chance)
        if made is not None:
            return made


def case_of(seed: int, world: World, chance: random.Random) -> Case | None:
    """None: of this world's packets too many, or too few, are allowed."""
    model = Model(world)
    shots = _chosen(chance, [model.judged(shot) for shot in once(Aim(chance, model).shots())])
    made = Case(seed, world, shots)
    return made if len(shots) == PACKETS and WELL[0] <= made.allowed <= WELL[1] else None


def _chosen(chance: random.Random, pool: list[Shot]) -> list[Shot]:
    """In turn, those of which different rules had a say; not more than 70 % of one word."""
    by_word: dict[bool, list[Shot]] = {}
    for word in (True, False):
        groups: dict[object, list[Shot]] = {}
        for shot in pool:
            if shot.word is word:
                groups.setdefault((shot.deciders, HOST in (shot.sender, shot.receiver)), []).append(shot)
        mixed = [shot for turn in zip_longest(*groups.values()) for shot in turn if shot is not None]
        by_word[word] = mixed[: int(PACKETS * WELL[1])]
    half = PACKETS // 2
    yes, no = by_word[True], by_word[False]
    found = yes[: max(half, PACKETS - len(no))] + no[: max(half, PACKETS - len(yes))]
    chance.shuffle(found)
    return found


def once(shots: Iterable[Shot]) -> list[Shot]:
    """No flow twice, in no direction: conntrack would take the second for the first, or its answer."""
    found: dict[object, Shot] = {}
    for shot in shots:
        p = shot.packet
        ends = frozenset(((p.source, p.source_port), (p.destination, p.destination_port)))
        found.setdefault((ends, p.protocol) if p.icmp is None else id(shot), shot)
    return list(found.values())


def _is_pair(one: Spot, other: Spot) -> bool:
    """Neither to itself, nor past h1's guests and h1."""
    return one.where != other.where and not {one.where, other.where} <= {UP0, UP1}


def _pairs(sources: list[Spot], destinations: list[Spot]) -> bool:
    return any(_is_pair(one, other) for one in sources for other in destinations)


class Aim:
    """Packets at random, and such as some rule asks for, or just does not."""

    def __init__(self, chance: random.Random, model: Model) -> None:
        self.chance, self.who = chance, model.judge.who
        self.world = model.judge.world
        every = spots(self.world)
        some = {version: [s for s in every if len(s.address) == width] for version, width in ((4, 4), (6, 16))}
        self.spots: Ends = {}
        for version, other in ((4, 6), (6, 4)):
            spoken = some[version] if _pairs(some[version], some[version]) else some[other]
            self.spots[version] = spoken, spoken

    def shots(self) -> Iterator[Shot]:
        if not any(_pairs(*ends) for ends in self.spots.values()):
            return  # nobody is there
        for _ in range(POOL):
            yield self.shot(Rule(Action.ALLOW), self.spots)
        for item in (*self.world.policies, *self.world.profiles):
            for way in Direction:
                for rule in item.rules(way):
                    fitting = self.fitting(rule, way)
                    yield from (self.shot(rule, fitting) for _ in range(10))
                    yield from (self.shot(rule, self.spots) for _ in range(2))

    def fitting(self, rule: Rule, way: Direction) -> Ends:
        """Pairs of places that the rule asks for, at which somebody is asked for it."""
        found = {}
        for version, (some, _) in self.spots.items():
            peers = rule.source, rule.destination
            sources, destinations = ([s for s in some if self.fits(peer, s)] for peer in peers)
            asked = sources if way is Direction.EGRESS else destinations
            asked[:] = [s for s in asked if s.where not in (UP0, UP1)] or asked
            found[version] = (sources, destinations) if _pairs(sources, destinations) else (some, some)
        return found

    def fits(self, peer: Peer, spot: Spot) -> bool:
        only = Rule(Action.ALLOW, source=replace(peer, ports=(), not_ports=()))
        return rule_matches(only, Packet(spot.address, spot.address, 6), self.who)

    def shot(self, rule: Rule, ends: Ends) -> Shot:
        version = rule.ip_version or {1: 4, 58: 6}.get(rule.protocol or 0) or self.version(rule)
        source, destination = self.pair(*ends[version])
        version = 4 if len(source.address) == 4 else 6
        protocol = self.protocol(rule, version, HOST in (source.where, destination.where))
        protocol = {1: 58, 58: 1}[protocol] if version == {1: 6, 58: 4}.get(protocol) else protocol
        ports: tuple[int | None, int | None] = (None, None)
        icmp = None
        if protocol in WITH_PORTS:
            ports = (
                self.port(rule.source, self.chance.randint(20000, 20160)),
                self.port(rule.destination, self.chance.choice(PORTS)),
            )
        elif protocol in KINDS:
            asked = (rule.icmp or rule.not_icmp) if rule.protocol == protocol else None
            kind = asked.type if asked and self.chance.random() < 0.8 else self.chance.choice(KINDS[protocol])
            icmp = Icmp(kind, self.chance.choice((0, 0, 1)))
        out, into = (spot.where if spot.where in (UP0, UP1) else None for spot in (destination, source))
        packet = Packet(source.address, destination.address, protocol, *ports, icmp, out, into)
        return Shot(packet, source.where, destination.where)

    def version(self, rule: Rule) -> int:
        nets = rule.source.nets or rule.destination.nets
        return self.chance.choice(nets).version if nets else self.chance.choice((4, 6))

    def pair(self, sources: list[Spot], destinations: list[Spot]) -> tuple[Spot, Spot]:
        while True:
            one, other = self.place(sources), self.place(destinations)
            if _is_pair(one, other):
                return one, other

    def place(self, some: list[Spot]) -> Spot:
        where = self.chance.choice(sorted({s.where for s in some}))
        return self.chance.choice([s for s in some if s.where == where])

    def protocol(self, rule: Rule, version: int, of_host: bool) -> int:
        if rule.protocol is not None:
            return rule.protocol
        if rule.not_protocol is not None and self.chance.random() < 0.3:
            return rule.not_protocol if rule.not_protocol != 1 or version == 4 else 58
        odd = self.chance.choice(BARE) if of_host else self.chance.randint(143, 252)
        return self.chance.choice((6, 6, 6, 17, 17, 132, 136, {4: 1, 6: 58}[version], odd))

    def port(self, peer: Peer, otherwise: int) -> int:
        asked = peer.ports or peer.not_ports
        if not asked or self.chance.random() < 0.15:
            return otherwise
        return self.edge(self.chance.choice(asked))

    def edge(self, asked: PortRange) -> int:
        first, last = asked
        found = self.chance.choice((first, last, first - 1, last + 1, first, last, (first + last) // 2))
        return min(max(found, 1), 65535)
