# Owns: all addresses of two worlds in classes whose members every rule of both treats alike, and who they belong to:
# guests, hosts, what lies behind a guest, everybody else. Pure.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from slash32.matching import World, effective_labels
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address, Prefix, format_address
from slash32.programs import Judge
from slash32.reading import Lexicon, Reading, Seat, ruled
from slash32.regions import Region, Regions
from slash32.traffic import Space

ANONYMOUS = "\0"  # some host: which one matters only for two that may be the same
Identity = EndpointKey | tuple[str, str] | Address | int
OwnerKind = Literal["endpoint", "address", "behind", "host", "outside"]  # address: of several guests, or moving


class Side(NamedTuple):
    """What one world makes of an address: the questions of rules that hold for it, and who is asked."""

    questions: int
    seats: frozenset[Seat]


class Class(NamedTuple):
    version: int
    before: Side
    after: Side


class Owner(NamedTuple):
    """Whose addresses they are, as people know them."""

    kind: OwnerKind
    name: str
    host: str = ""  # where it is, if host endpoints there are asked
    region: int = -1  # of what is behind a guest, or outside
    endpoint: Endpoint | None = None


@dataclass(slots=True)
class Group:
    """Owners of one kind that no rule tells apart."""

    kind: OwnerKind
    classes: tuple[int, ...]
    versions: frozenset[int]
    members: list[Owner] = field(default_factory=list)
    hosts: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Classified:
    classes: list[Class]
    groups: list[Group]
    regions: Regions
    spaces: dict[int, Space]
    judge: Judge
    labels: dict[EndpointKey, dict[str, str]]  # in force, after (before, of those that are gone)
    keys: tuple[str, ...]  # the labels that selectors name


def classify(before: World, after: World) -> Classified:
    return _Sorting(before, after).result()


class _Sorting:
    def __init__(self, before: World, after: World) -> None:
        self.lexicon = Lexicon((before, after))
        self.worlds = (Reading(before, self.lexicon), Reading(after, self.lexicon))
        self.addresses = sorted({a for w in self.worlds for a in (*w.own, *w.at_hosts)}, key=lambda a: (len(a), a))
        nets = {net for world in (before, after) for net in _rule_nets(world)}
        ours = {prefix for world in self.worlds for prefix in (*world.behind, *world.sets)}
        self.rule_nets = frozenset(nets)
        self.regions = Regions(nets | ours)
        self.places = [self.regions.region_of(address) for address in self.addresses]
        for place in self.places:
            self.regions.all[place].taken += 1
        self.relevant = {host for world in self.worlds for host in world.hosts}
        self.named = self._named() if self.relevant else frozenset()
        self._region_bits: dict[tuple[int, int], int] = {}
        self._questions: dict[tuple[tuple[Prefix, ...], int], int] = {}
        self._sides: dict[tuple[int, int, frozenset[Seat]], Side] = {}

    # --- who is where

    def claimants(self, number: int, address: Address | None, place: int) -> list[Endpoint]:
        """In world `number`; `address` None: of what is left of the region."""
        world = self.worlds[number]
        if address is not None and address in world.own:
            return world.own[address]
        for prefix in self.regions.all[place].within if world.behind else ():
            if prefix in world.behind:
                return world.behind[prefix]
        return []

    def hosts(self, number: int, address: Address | None, place: int) -> tuple[str, ...]:
        """Of each who is there."""
        world = self.worlds[number]
        guests = self.claimants(number, address, place)
        if guests or address is None:
            return tuple(sorted({world.host_of(guest) for guest in guests}))
        return tuple(sorted({each.node for each in world.at_hosts.get(address, ())}))

    def _named(self) -> frozenset[str]:
        """Hosts that must be told apart, because an address of theirs is not theirs alone, or not in both worlds."""
        found: set[str] = set()
        for address, place in self.points():
            before, after = (self.hosts(number, address, place) for number in (0, 1))
            if before != after or len(before) > 1:
                found.update(before, after)
        return frozenset(found - {""})

    def points(self) -> Iterator[tuple[Address | None, int]]:
        """Every address that stands for itself, and what is left of every region."""
        yield from zip(self.addresses, self.places, strict=True)
        yield from ((None, place) for place, region in enumerate(self.regions.all) if region.size > region.taken)

    # --- what rules make of it

    def result(self) -> Classified:
        seats = [(self.seats(0, *point), self.seats(1, *point)) for point in self.points()]  # compiles all programs
        numbers: dict[Class, int] = {}
        owned: dict[Identity, tuple[Owner, set[int]]] = {}
        for (address, place), asked in zip(self.points(), seats, strict=True):
            sides = (self.side(number, address, place, asked[number]) for number in (0, 1))
            key = Class(self.regions.all[place].version, *sides)
            number = numbers.setdefault(key, len(numbers))
            identity, owner = self.owner(address, place)
            owned.setdefault(identity, (owner, set()))[1].add(number)
        return self._classified(list(numbers), owned.values())

    def seats(self, number: int, address: Address | None, place: int) -> frozenset[Seat]:
        world = self.worlds[number]
        found = {world.seat(guest) for guest in self.claimants(number, address, place)}
        if not found and address is not None:
            found = {world.host_seat(each.node) for each in world.at_hosts.get(address, ())}
        return frozenset(self._masked(seat) for seat in found or (Seat(),))

    def _masked(self, seat: Seat) -> Seat:
        return seat._replace(host=ANONYMOUS) if seat.host and seat.host not in self.named else seat

    def side(self, number: int, address: Address | None, place: int, seats: frozenset[Seat]) -> Side:
        world = self.worlds[number]
        bits = self._found_by(number, place)
        for each in (*world.own.get(address, ()), *world.at_hosts.get(address, ())) if address is not None else ():
            bits |= world.bits(each)
        key = (place, bits, seats)
        found = self._sides.get(key)
        if found is None:
            found = self._sides[key] = Side(self._holding(place, bits), seats)
        return found

    def _found_by(self, number: int, place: int) -> int:
        """The selectors that find all of a region."""
        found = self._region_bits.get((number, place))
        if found is None:
            world, found = self.worlds[number], 0
            for prefix in self.regions.all[place].within:
                found |= world.sets.get(prefix, 0)
                for guest in world.behind.get(prefix, ()):
                    found |= world.bits(guest)
            self._region_bits[number, place] = found
        return found

    def _holding(self, place: int, bits: int) -> int:
        within = tuple(prefix for prefix in self.regions.all[place].within if prefix in self.rule_nets)
        found = self._questions.get((within, bits))
        if found is None:
            found = 0
            for number, asked in enumerate(self.lexicon.compiler.questions):
                found |= (
                    (not asked.nets or not asked.nets.isdisjoint(within))
                    and asked.not_nets.isdisjoint(within)
                    and (asked.selector is None or bool(bits & self.lexicon.bit(asked.selector)))
                    and not bits & self.lexicon.bit(asked.not_selector)
                ) << number
            self._questions[within, bits] = found
        return found

    # --- whose it is

    def owner(self, address: Address | None, place: int) -> tuple[Identity, Owner]:
        """With what makes it one with others. Who has it after the change names it."""
        number = 1 if self.claimants(1, address, place) else 0
        guests = self.claimants(number, address, place)
        host = next(iter(self.hosts(1, address, place) or self.hosts(0, address, place)), "")
        if address is None:
            region = self.regions.all[place]
            names = ", ".join(guest.domain for guest in guests)
            return place, Owner("behind" if guests else "outside", names or str(region.prefix), host, place)
        if len(guests) == 1 and address in self.worlds[number].own:
            return guests[0].key, Owner("endpoint", guests[0].domain, host, endpoint=guests[0])
        if guests:
            names = ", ".join(guest.domain for guest in guests)
            return address, Owner("address", f"{format_address(address)} ({names})", host)
        return ("host", host), Owner("host", host, host)

    def _classified(self, classes: list[Class], owned: Iterable[tuple[Owner, set[int]]]) -> Classified:
        groups: dict[tuple[OwnerKind, tuple[int, ...]], Group] = {}
        for owner, numbers in owned:
            own = tuple(sorted(numbers))
            versions = frozenset(classes[number].version for number in own)
            group = groups.setdefault((owner.kind, own), Group(owner.kind, own, versions))
            group.members.append(owner)
            group.hosts[owner.host] += 1
        keys = self.lexicon.compiler.keys()
        spaces = {family: Space(family, keys) for family in (4, 6)}
        judge = Judge(self.lexicon.compiler.programs, spaces)
        labels: dict[EndpointKey, dict[str, str]] = {}
        for world in self.worlds:
            labels |= {e.key: effective_labels(e, world.profiles) for e in world.world.endpoints}
        return Classified(classes, list(groups.values()), self.regions, spaces, judge, labels, self.lexicon.keys)


def _rule_nets(world: World) -> Iterator[Prefix]:
    for item in ruled(world):
        for rule in (*item.ingress, *item.egress):
            for peer in (rule.source, rule.destination):
                yield from (*peer.nets, *peer.not_nets)


def outermost(regions: Regions, chosen: Iterable[int]) -> tuple[list[Prefix], list[Prefix]]:
    """Of some regions: the prefixes that cover them, and what of these is not theirs."""
    wanted = {regions.all[number].prefix: regions.all[number] for number in chosen}
    covering = [p for p, region in wanted.items() if not _parent(region) or _parent(region) not in wanted]
    missing = [hole for region in wanted.values() for hole in region.holes if hole not in wanted]
    return sorted(covering), sorted(missing)


def _parent(region: Region) -> Prefix | None:
    return region.within[1] if len(region.within) > 1 else None
