# Owns: a folder of examples (world.yaml, policy.yaml, expected.matrix): its world, what the matrix promises, and what
# the model and the hosts' compiled packet filters say.
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from hostd.compiler.calc import Calculation
from hostd.compiler.desired import Desired
from hostd.compiler.ruleset import (
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    HOST_FROM_GUESTS,
    HOST_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
)
from hostd.compiler.world import World as Told
from hostd.revocation.judge import View, Ways, judge
from hostd.state import Carrier, Local, Locals, Phase
from slash32 import selector as selectors
from slash32.cli.explain import Traffic, _end, _families, parse_traffic
from slash32.documents import load_yaml
from slash32.matching import Whereabouts
from slash32.model import Endpoint
from slash32.net import Address, Prefix
from slash32.pack import AddressSet
from slash32.rules import WITH_PORTS
from slash32.verdict import Judge, Packet, Verdict, World, effective_labels
from slash32.worldfile import read_world

EXAMPLES = Path(__file__).parents[1] / "examples"
PORT = 50000  # source
UPLINK = "eth0"  # by which hosts see one another and the world, in these examples


class Cell(NamedTuple):
    source: str
    destination: str
    traffic: str  # as `slash32 explain` takes it; or ping: icmp and icmpv6


@dataclass(frozen=True)
class Recipe:
    folder: Path
    policy: str = "policy.yaml"  # "": none

    @cached_property
    def world(self) -> World:
        names = [name for name in ("world.yaml", self.policy) if name]
        documents = [load_yaml((self.folder / name).read_text(), name) for name in names]
        return read_world([document for listed in documents for document in listed])

    @cached_property
    def listed(self) -> dict[Cell, bool]:
        """As written: lines FROM TO TRAFFIC allow|deny; of the first three each may be several, with commas."""
        found: dict[Cell, bool] = {}
        for line in (self.folder / "expected.matrix").read_text().splitlines():
            words = line.partition("#")[0].split()
            if words:
                *what, word = words
                for cell in itertools.starmap(Cell, itertools.product(*(each.split(",") for each in what))):
                    assert cell not in found, f"twice: {cell}"
                    found[cell] = {"allow": True, "deny": False}[word]
        return found

    def expected(self) -> dict[Cell, bool]:
        """What is not listed, of the ends and the traffic that are, is denied. Not strangers among themselves."""
        ends = sorted({end for cell in self.listed for end in (cell.source, cell.destination)})
        kinds = sorted({cell.traffic for cell in self.listed})
        return {
            cell: self.listed.get(cell, False)
            for cell in (Cell(a, b, kind) for a in ends for b in ends for kind in kinds)
            if cell.source != cell.destination and self._meet(cell)
        }

    def _meet(self, cell: Cell) -> bool:
        ends = [_end(self.world, end) for end in cell[:2]]
        addresses = {address for end in ends for address in end.addresses.values()}
        ours = any(self._who.claimants(address) or self._who.hosts(address) for address in addresses)
        return ours and any(all(family in end.addresses for end in ends) for family in (4, 6))

    @cached_property
    def _who(self) -> Whereabouts:
        return Whereabouts(self.world)

    def packets(self, cell: Cell) -> Iterator[Packet]:
        """One for each IP version that both ends have."""
        ends = _end(self.world, cell.source), _end(self.world, cell.destination)
        for word in ("icmp", "icmpv6") if cell.traffic == "ping" else (cell.traffic,):
            traffic = parse_traffic(word)
            assert isinstance(traffic, Traffic), traffic
            of = {"icmp": 4, "icmpv6": 6}.get(word)
            common = [family for family in (4, 6) if all(family in end.addresses for end in ends)]
            if of is not None and of not in common:
                continue
            for family in _families(ends, traffic, None):
                addresses = (end.addresses[family] for end in ends)
                port = PORT if traffic.protocol in WITH_PORTS else None
                yield Packet(*addresses, traffic.protocol, port, traffic.port, traffic.icmp)

    def model(self, cell: Cell) -> list[Verdict]:
        judge = Judge(self.world)
        found = [judge.verdict(packet) for packet in self.packets(cell)]
        assert found, cell
        return found

    @cached_property
    def hosts(self) -> dict[str, HostFilter]:
        names = {*self.world.places.values(), *(h.node for h in self.world.host_endpoints)}
        return {name: HostFilter(name, self.world) for name in sorted(names)}

    def told(self, host: str) -> Told:
        return told(self.world, host)

    def compiled(self, cell: Cell) -> list[bool]:
        """What the packet filters of the hosts on the way say together."""
        judge = Judge(self.world)
        return [
            all(host.lets_by(packet, judge.verdict(packet)) for host in self.hosts.values())
            for packet in self.packets(cell)
        ]


def recipes() -> list[Recipe]:
    return [Recipe(path.parent) for path in sorted(EXAMPLES.glob("**/expected.matrix"))]


def members(world: World) -> dict[str, AddressSet]:
    """Of every selector that a rule has, as the dispatcher hands them out."""
    known = {profile.name: profile for profile in world.profiles}
    items = (*world.policies, *world.profiles)
    peers = [peer for item in items for r in (*item.ingress, *item.egress) for peer in (r.source, r.destination)]
    found = {text: AddressSet() for peer in peers for text in (peer.selector, peer.not_selector) if text is not None}
    for text, value in found.items():
        chosen = selectors.parse(text)
        for guest in world.endpoints:
            if chosen.matches(effective_labels(guest, known)):
                value.addresses.update(guest.all_addresses())
                value.prefixes.update(guest.prefixes)
        for host in world.host_endpoints:
            if chosen.matches(effective_labels(host, known)):
                value.addresses.update(host.addresses)
        for each in world.sets:
            if chosen.matches(each.labels):
                whole = {net for net in each.nets if net.length == 8 * len(net.network)}
                value.addresses.update(net.network for net in whole)
                value.prefixes.update(set(each.nets) - whole)
    return found


def told(world: World, host: str) -> Told:
    """What the dispatcher tells this host."""
    return Told(
        {p.name: p for p in world.policies if not p.staged},
        {p.name: p for p in world.profiles},
        members(world),
        tiers={t.name: t for t in world.tiers},
        staged={p.name: p for p in world.policies if p.staged},
        host_endpoints={h.name: h for h in world.host_endpoints if h.node == host},
    )


def running(number: int, guest: Endpoint) -> Local:
    return Local(guest, "qemu", Phase.LIVE, Carrier(f"vnet{number}", 100 + number), guest)


class HostFilter:
    """One host's abstract packet filter, asked as its skeleton asks."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        here = [running(n, guest) for n, guest in enumerate(world.endpoints) if world.places.get(guest.key) == name]
        built = Calculation.build(name, told(world, name), Locals({x.endpoint.key: x for x in here}))
        self.desired: Desired = built.desired
        self._members = {name: [*self.desired.members(name)] for name in self.desired.sets}
        self._view = View(self.desired.chains, self._contains)
        self._own = {a for h in world.host_endpoints if h.node == name for a in h.addresses}

    def _contains(self, name: str, address: Address) -> bool:
        found = self._members[name]
        return any(m.contains(address) if isinstance(m, Prefix) else m == address for m in found)

    def lets_by(self, packet: Packet, said: Verdict) -> bool:
        """Failsafes are the skeleton's, which is not asked here: for them the model's word is taken."""
        packet = replace(packet, in_interface=UPLINK, out_interface=UPLINK)
        stages = {end: getattr(said, end) for end in ("host_egress", "host_ingress")}
        always = {end for end, stage in stages.items() if stage is not None and stage.kind == "failsafe"}
        asked = {end: chain for end, chain in self._chains(packet).items() if end not in always}
        if asked.get("host_ingress") == HOST_FROM_GUESTS and not self.desired.chains.get(HOST_GUESTS):
            return False  # the skeleton's: closed where there is no host endpoint "*"
        ways = Ways(UPLINK, UPLINK)
        return all(judge(self._view, chain, packet, ways).accept is not False for chain in asked.values())

    def _chains(self, packet: Packet) -> dict[str, str]:
        source, destination = self._taps(packet.source), self._taps(packet.destination)
        own = [address in self._own for address in (packet.source, packet.destination)]
        chains = {f"egress {n}": self.desired.taps[n].chains.egress for n in source}
        chains |= {f"ingress {n}": self.desired.taps[n].chains.ingress for n in destination}
        here = bool(source) or own[0], bool(destination) or own[1]
        if all(here):
            if source and own[1]:
                chains["host_ingress"] = HOST_FROM_GUESTS
            if own[0] and destination:
                chains["host_egress"] = HOST_TO_GUESTS
        elif here[0]:
            chains["host_egress"] = HOST_OUT if own[0] else HOST_FORWARD_OUT
        elif here[1]:
            chains["host_ingress"] = HOST_IN if own[1] else HOST_FORWARD_IN
        return chains

    def _taps(self, address: Address) -> list[int]:
        return [
            ifindex
            for ifindex, tap in self.desired.taps.items()
            if address in tap.addresses or any(prefix.contains(address) for prefix in tap.prefixes)
        ]
