# Measures: a set of 100,000 members, one more member of it, and 1,000 routes, from the dispatcher's word (as the
# replica applied it) to the kernel (`whole`) or the write alone (`door`), against `nft -f`, `ip -batch` and the floor
# (the same bytes, sent again). Bar 5: at most 1/4 of nft for the set, 1/100 of nft for one more, 1/3 of `ip -batch`.
#   python -m bench.bulk [--json] [-n N] [--members 100000] [--routes 1000]
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.measure import Case, Report, measure
from bench.rig import Host, Namespace, Recording, raw_sockets, world
from hostd.compiler.absorb import absorb
from hostd.compiler.forwarding import Add, Delete, Route
from hostd.compiler.ruleset import SetKind, SetSpec
from slash32.net import Prefix, format_address
from slash32.pack import AddressSet, Kind
from slash32.sync import Applied
from slash32.wire import Change, Members, Put
from slash32.wire import Delete as Withdraw

SELECTOR = 'role == "web"'
SLOW = 10  # rounds per run of what takes long
HOP = bytes([192, 0, 2, 2])
_DOOR = "addr4-door"


def numbered(base: int, count: int) -> list[bytes]:
    return [(base + 4 * i).to_bytes(4, "big") for i in range(count)]


class Sets:
    """A host whose policies ask one big set."""

    def __init__(self, members: int) -> None:
        given = world(0)
        self.all = numbered(0x0B000000, members)
        self.received = set(self.all)
        self.value = given.sets[SELECTOR]
        self.host = Host(0, given)
        self.sockets = raw_sockets()

    def recorded(self, action: Callable[[], None]) -> Callable[[], None]:
        """Does it, and returns what does the same again with no program around it."""
        recording = Recording()
        with recording.taken():
            action()
        return lambda: recording.replay(self.sockets)

    def _replaced(self, value: set[bytes]) -> None:
        self.value.addresses = value
        put: Change = Put(Kind.SET, SELECTOR, self.value)
        self.host.settle(absorb(self.host.calc, [Applied(1, (put,), True)]))

    def ready(self) -> None:
        self.host.enter()
        self.received = set(self.all)  # which the replica has made of the dispatcher's word

    def fill(self) -> None:
        self._replaced(self.received)

    def empty(self) -> None:
        self._replaced(set())

    def change(self, add: set[bytes], remove: set[bytes]) -> None:
        """What Replica.receive does to its value, and then what hostd does."""
        self.value.addresses |= add
        self.value.addresses -= remove
        change: Change = Members(SELECTOR, AddressSet(add), AddressSet(remove))
        self.host.settle(absorb(self.host.calc, [Applied(1, (change,), False)]))


class Door:
    """A set of the same size, written by a transaction of the packet filter alone."""

    def __init__(self, host: Host, members: int) -> None:
        self.table = host.kernel.table
        change = self.table.transaction()
        change.add_set(_DOOR, SetSpec(SetKind.ADDR4, 4 * members), 0)
        change.commit()

    def add(self, members: Iterable[bytes]) -> None:
        change = self.table.transaction()
        change.add_members(_DOOR, SetKind.ADDR4, members, 0)
        change.commit()

    def remove(self, members: Iterable[bytes]) -> None:
        change = self.table.transaction()
        change.delete_members(_DOOR, SetKind.ADDR4, members, 0)
        change.commit()

    def empty(self) -> None:
        change = self.table.transaction()
        change.flush_set(_DOOR, 0)
        change.commit()


class Peer:
    """`nft -f -` in a namespace of its own."""

    def __init__(self, members: list[bytes]) -> None:
        self.namespace = Namespace()
        self.nft("add table ip peer\nadd set ip peer s { type ipv4_addr; size 1000000; }\n")
        self.members = f"add element ip peer s {{ {', '.join(map(format_address, members))} }}\n"

    @staticmethod
    def nft(text: str) -> None:
        subprocess.run(["nft", "-f", "-"], input=text.encode(), check=True)

    def fill(self) -> None:
        self.nft(self.members)

    def empty(self) -> None:
        self.nft("flush set ip peer s\n")


class Routes:
    def __init__(self, count: int) -> None:
        self.host = Host(0, world(0))
        self.prefixes = [Prefix((0x0A800000 + i).to_bytes(4, "big"), 32) for i in range(count)]
        given = self.host.world
        self.table: dict[Prefix, tuple[str, ...]] = {}
        given.hosts, given.routes = {"h2": (HOP,)}, self.table
        self.puts = tuple(Put(Kind.ROUTE, prefix, ("h2",)) for prefix in self.prefixes)
        self.gone = tuple(Withdraw(Kind.ROUTE, prefix) for prefix in self.prefixes)
        self.added, self.removed = Recording(), Recording()
        self.ready()
        with self.added.taken():
            self.add()
        with self.removed.taken():
            self.remove()
        self.sockets = raw_sockets()

    def ready(self) -> None:
        """The replica has applied the dispatcher's word."""
        self.host.enter()
        self.table.update(dict.fromkeys(self.prefixes, ("h2",)))

    def add(self) -> None:
        self.host.settle(absorb(self.host.calc, [Applied(1, self.puts, False)]))

    def remove(self) -> None:
        self.table.clear()
        self.host.settle(absorb(self.host.calc, [Applied(1, self.gone, False)]))

    def script(self, verb: str, directory: Path) -> Path:
        path = directory / verb
        path.write_text("".join(f"route {verb} {prefix} via 192.0.2.2\n" for prefix in self.prefixes))
        return path


def _ip(script: Path) -> None:
    subprocess.run(["ip", "-batch", str(script)], check=True, stdout=subprocess.DEVNULL)


def set_cases(members: int) -> dict[str, Case]:
    ours = Sets(members)
    ours.ready()
    fill, empty = ours.recorded(ours.fill), ours.recorded(ours.empty)
    peer = Peer(numbered(0x0B000000, members))
    enter, alone, enter_peer = ours.host.enter, ours.host.namespace.enter_alone, peer.namespace.enter_alone
    door = Door(ours.host, members)
    return {
        "set, whole": Case(ours.fill, ours.ready, ours.empty, SLOW),
        "set, door": Case(lambda: door.add(ours.all), enter, door.empty, SLOW),
        "set, floor": Case(fill, alone, empty, SLOW),
        "set, nft -f -": Case(peer.fill, enter_peer, peer.empty, SLOW),
    }


def member_cases(members: int) -> dict[str, Case]:
    """One more, where they all are."""
    ours, one = Sets(members), {b"\x0a\0\0\1"}
    ours.fill()

    def add() -> None:
        ours.change(one, set())

    def remove() -> None:
        ours.change(set(), one)

    replay = ours.recorded(add)
    remove()
    door = Door(ours.host, members)
    door.add(ours.all)
    peer = Peer(numbered(0x0B000000, members))
    peer.fill()
    enter, alone, enter_peer = ours.host.enter, ours.host.namespace.enter_alone, peer.namespace.enter_alone
    return {
        "+1, whole": Case(add, enter, remove),
        "+1, door": Case(lambda: door.add(one), enter, lambda: door.remove(one)),
        "+1, floor": Case(replay, alone, remove),
        "+1, nft -f -": Case(
            lambda: peer.nft("add element ip peer s { 10.0.0.1 }\n"),
            enter_peer,
            lambda: peer.nft("delete element ip peer s { 10.0.0.1 }\n"),
            SLOW,
        ),
    }


def route_cases(count: int, directory: Path) -> dict[str, Case]:
    routes = Routes(count)
    enter = routes.host.enter
    add, remove = routes.script("add", directory), routes.script("del", directory)
    sockets, rtnl = routes.sockets, routes.host.kernel.rtnl
    items = [Route(prefix, 0, HOP) for prefix in routes.prefixes]
    adds, deletes = list(map(Add, items)), list(map(Delete, items))
    return {
        "routes, whole": Case(routes.add, routes.ready, routes.remove),
        "routes, door": Case(lambda: rtnl.change(adds), enter, lambda: rtnl.change(deletes)),
        "routes, floor": Case(lambda: routes.added.replay(sockets), enter, lambda: routes.removed.replay(sockets)),
        "routes, ip -batch": Case(lambda: _ip(add), enter, lambda: _ip(remove), SLOW),
    }


def run(n: int, members: int, routes: int, json: bool) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        groups = (set_cases(members), member_cases(members), route_cases(routes, Path(directory)))
        measured = {name: found for group in groups for name, found in measure(group, n).items()}
    peers = {"set": ("nft -f -", 1 / 4), "+1": ("nft -f -", 1 / 100), "routes": ("ip -batch", 1 / 3)}
    bar = {f"{w}, {ours} / {w}, {peer}": limit for w, (peer, limit) in peers.items() for ours in ("whole", "door")}
    pairs = (*bar, *(f"{w}, {ours} / {w}, floor" for w in peers for ours in ("whole", "door")))
    ratios = {pair: measured[pair.split(" / ")[0]].median / measured[pair.split(" / ")[1]].median for pair in pairs}
    return Report(f"bulk ({members} members, {routes} routes)", measured, ratios, bar).tell(json)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.bulk")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--members", type=int, default=100_000)
    parser.add_argument("--routes", type=int, default=1_000)
    given = parser.parse_args()
    return 0 if run(given.n, given.members, given.routes, given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
