# The examples' tables of verdicts, packet by packet through a kernel: each host of an example's world in turn, with
# what hostd would load there. A packet is allowed if every host on its way lets it by.
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import filters
import pytest
from fabric import Fabric, one_cpu
from netns import run
from verdict_packets import Shot
from verdict_worlds import HOST, UP0

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.calc import Calculation
from hostd.compiler.ruleset import Guard
from hostd.state import Carrier, Local, Locals, Phase
from slash32.matching import Whereabouts
from slash32.model import Endpoint
from slash32.net import Address, format_address
from slash32.verdict import Packet
from tests.recipes import Cell, Recipe, recipes

FIRST_PORT = 20000  # every packet is a flow of its own
Asked = tuple[Cell, Packet]


class Stage:
    """One host of a recipe, on the fabric."""

    def __init__(self, fabric: Fabric, recipe: Recipe, host: str) -> None:
        self.fabric, self.recipe, self.host = fabric, recipe, host
        world = recipe.world
        here = [guest for guest in world.endpoints if world.places.get(guest.key) == host]
        self.taps = {guest.key: f"vnet{number}" for number, guest in enumerate(world.endpoints, 1)}  # as their MACs are
        self.own = {a for each in world.host_endpoints if each.node == host for a in each.addresses}
        self.local = {address: guest for guest in here for address in guest.all_addresses()}
        self.far: set[Address] = set()
        self._load(here)

    def _load(self, here: list[Endpoint]) -> None:
        locals_ = Locals({guest.key: self._running(guest) for guest in here})
        calc = Calculation.build(self.host, self.recipe.told(self.host), locals_)
        settler = Settler(self.fabric.kernel, calc, Limits(Guard().group_base), ("vnet",))
        settler.resync()
        assert settler.failures() == []
        for address in self.own:
            more = ["nodad"] if len(address) == 16 else []
            run("ip", "address", "add", format_address(address), "dev", "lo", *more)
        run("conntrack", "-F")

    def _running(self, guest: Endpoint) -> Local:
        tap = self.taps[guest.key]
        return Local(guest, "qemu", Phase.LIVE, Carrier(tap, self.fabric.ports[tap].ifindex), guest)

    def leave(self) -> None:
        for address in self.own:
            run("ip", "address", "del", format_address(address), "dev", "lo")
        for address in self.far:
            run("ip", _version(address), "route", "del", format_address(address), "dev", UP0)

    def shots(self, asked: list[Asked]) -> dict[int, Shot]:
        """By number of the packet; none where this host is not on the way."""
        found = {}
        for number, (_, packet) in enumerate(asked):
            sender, receiver = self._port(packet.source), self._port(packet.destination)
            if (sender, receiver) != (UP0, UP0):
                for address, port in ((packet.source, sender), (packet.destination, receiver)):
                    if port == UP0 and address not in self.local and address not in self.far:
                        self._far(address)
                found[number] = Shot(packet, sender, receiver)
        return found

    def _port(self, address: Address) -> str:
        if address in self.own:
            return HOST
        guest = self.local.get(address)
        return UP0 if guest is None else self.taps[guest.key]

    def _far(self, address: Address) -> None:
        version, shown = _version(address), format_address(address)
        mac = self.fabric.ports[UP0].mac.hex(":")
        run("ip", version, "neigh", "replace", shown, "lladdr", mac, "dev", UP0, "nud", "permanent")
        run("ip", version, "route", "replace", shown, "dev", UP0)
        self.far.add(address)


def _version(address: Address) -> str:
    return "-4" if len(address) == 4 else "-6"


def to_itself(recipe: Recipe, packet: Packet) -> bool:
    """From a shared address to its claimant, or back: that never leaves the guest."""
    who = Whereabouts(recipe.world)
    ends = [{guest.key for guest in who.claimants(address)} for address in (packet.source, packet.destination)]
    return bool(ends[0] & ends[1])


def arrived(fabric: Fabric, recipe: Recipe, asked: list[Asked]) -> dict[Cell, set[bool]]:
    """What became of each packet, by cell."""
    passed = [True] * len(asked)
    asked_of = set()
    with fabric.home.entered():
        for host in recipe.hosts:
            stage = Stage(fabric, recipe, host)
            shots = stage.shots(asked)
            came = fabric.send([*shots.values()])
            for position, number in enumerate(shots):
                passed[number] &= position in came
                asked_of.add(number)
            stage.leave()
    assert asked_of == set(range(len(asked))), "every packet has a host to pass"
    found: dict[Cell, set[bool]] = defaultdict(set)
    for (cell, _), word in zip(asked, passed, strict=True):
        found[cell].add(word)
    return dict(found)


@pytest.fixture
def fabric(packet_filter: str) -> Iterator[Fabric]:
    with one_cpu():
        made = Fabric(filters.chosen)
        yield made
        made.close()


def test_packets_go_where_the_tables_say(fabric: Fabric) -> None:
    for recipe in recipes():
        expected = recipe.expected()
        packets = [(c, packet) for c in expected for packet in recipe.packets(c) if not to_itself(recipe, packet)]
        asked = [(cell, _own_flow(packet, number)) for number, (cell, packet) in enumerate(packets)]
        found = arrived(fabric, recipe, asked)
        wrong = {cell: words for cell, words in found.items() if words != {expected[cell]}}
        assert wrong == {}, f"{recipe.folder.name}: {len(wrong)} of {len(expected)}"


def _own_flow(packet: Packet, number: int) -> Packet:
    return packet if packet.source_port is None else replace(packet, source_port=FIRST_PORT + number)


def test_without_policy_nothing_goes(fabric: Fabric) -> None:
    """The control: it is the policies that let the packets through."""
    recipe = Recipe(recipes()[0].folder, "")
    asked = [(cell, packet) for cell in recipe.expected() for packet in recipe.packets(cell)]
    assert set().union(*arrived(fabric, recipe, asked).values()) == {False}
