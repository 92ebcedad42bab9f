# Measures the second packet filter (iptables-legacy with ipset): one endpoint with 1, 1,000 and 5,000 present, against
# one `iptables-legacy-restore` of the classic ruleset; a set of 100,000 and one more member, against `ipset restore`;
# a policy that changes, where few and where 1,000 are loaded, against `iptables-legacy-restore` of one chain of them;
# what a packet costs the processor, against plain forwarding; and what looking for others' changes does.
# Bars: as for nf_tables, where the kernel's iptables is not what sets the price.
#   python -m bench.iptables [--json] [-n N] [--present 1,1000,5000] [--members 100000] [--policies 1000]
from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

from bench import bulk, endpoint, packets
from bench.measure import Case, Report, Stats, collect, stats
from bench.rig import BOTH, Host, Namespace
from hostd.compiler.absorb import absorb
from hostd.compiler.world import World
from hostd.daemon import POLL
from hostd.dataplane.filter import IPTABLES, NFTABLES
from hostd.dataplane.iptables.table import IptablesFilter
from slash32.net import format_address, parse_prefix
from slash32.pack import Kind
from slash32.policy import Action, Peer, Policy, PortRange, Rule
from slash32.sync import Applied
from slash32.wire import Put

PLAIN, RESTORE = "plain", ["iptables-legacy-restore", "--noflush"]
LOOKS = 20  # seconds


def tool(argv: list[str], stdin: str = "") -> None:
    subprocess.run(argv, input=stdin.encode(), check=True, stdout=subprocess.DEVNULL)


class Endpoints:
    """bench.endpoint with the other packet filter."""

    def __init__(self, present: list[int]) -> None:
        self.present = present
        self.groups = [self._cases(count) for count in present]

    @staticmethod
    def _cases(present: int) -> dict[str, Case]:
        found = endpoint.product_cases(present) | {"iptables-legacy-restore": endpoint.iptables_case(present)}
        return {f"{name} @{present}": case for name, case in found.items()}

    def bars(self) -> dict[str, float]:
        few, some, many = self.present[0], self.present[min(1, len(self.present) - 1)], self.present[-1]
        found = {}
        for what in ("whole", "filter"):
            found[f"{what} @{some} / iptables-legacy-restore @{some}"] = 1 / 80
            found[f"{what} @{many} / {what} @{few}"] = 3.0
        return found


# -- sets -------------------------------------------------------------------------------------------------------------


class Restored:
    """`ipset` in a namespace of its own."""

    def __init__(self, members: list[bytes]) -> None:
        self.namespace = Namespace()
        tool(["ipset", "create", "peer", "hash:ip", "maxelem", "1000000"])
        self.members = "".join(f"add peer {format_address(member)}\n" for member in members)

    def fill(self) -> None:
        tool(["ipset", "restore"], self.members)

    @staticmethod
    def empty() -> None:
        tool(["ipset", "flush", "peer"])


def set_cases(members: int) -> dict[str, Case]:
    ours, peer = bulk.Sets(members), Restored(bulk.numbered(0x0B000000, members))
    ours.ready()
    door = bulk.Door(ours.host, members)
    replay = ours.recorded(lambda: door.add(ours.all))
    door.empty()
    enter = ours.host.enter
    return {
        "set, whole": Case(ours.fill, ours.ready, ours.empty, bulk.SLOW),
        "set, door": Case(lambda: door.add(ours.all), enter, door.empty, bulk.SLOW),
        "set, floor": Case(replay, enter, door.empty, bulk.SLOW),
        "set, ipset restore": Case(peer.fill, peer.namespace.enter_alone, peer.empty, bulk.SLOW),
    }


def member_cases(members: int) -> dict[str, Case]:
    ours, peer, one = bulk.Sets(members), Restored(bulk.numbered(0x0B000000, members)), {b"\x0a\0\0\1"}
    ours.ready()
    ours.fill()
    peer.namespace.enter()
    peer.fill()

    def add() -> None:
        ours.change(one, set())

    def remove() -> None:
        ours.change(set(), one)

    ours.ready()
    replay = ours.recorded(add)
    remove()
    return {
        "+1, whole": Case(add, ours.host.enter, remove),
        "+1, floor": Case(replay, ours.host.namespace.enter_alone, remove),
        "+1, ipset add": Case(
            lambda: tool(["ipset", "-!", "add", "peer", "10.0.0.1"]),
            peer.namespace.enter_alone,
            lambda: tool(["ipset", "-!", "del", "peer", "10.0.0.1"]),
            bulk.SLOW,
        ),
    }


# -- a policy that changes --------------------------------------------------------------------------------------------


def policy(number: int, port: int = 80) -> Policy:
    """Of ten rules."""
    nets = parse_prefix(f"10.{number >> 8}.{number & 255}.0/24"), parse_prefix("fd00:65::/64")
    rules = tuple(
        Rule(Action.ALLOW, 6, source=Peer(nets=(net,)), destination=Peer(ports=(PortRange(port + n, port + n),)))
        for n in range(5) for net in nets
    )  # fmt: skip
    return Policy(f"p{number}", 'role == "web"', BOTH[:1], float(number), rules)


def policy_cases(count: int) -> dict[str, Case]:
    loaded = {f"p{n}": policy(n) for n in range(count)}
    host = Host(3, World(loaded, {}, {}, {}, {}))
    other = [policy(0, port) for port in (80, 8080)]

    def change() -> None:
        now = other[loaded["p0"] == other[0]]
        loaded["p0"] = now
        host.settle(absorb(host.calc, [Applied(1, (Put(Kind.POLICY, "p0", now),), False)]))

    chain = "".join(f"-A theirs -p tcp --dport {n} -j ACCEPT\n" for n in range(10))
    return {
        f"policy of {count}": Case(change, host.enter, None, bulk.SLOW),
        f"one chain, restored, of {count}": Case(
            lambda: tool(RESTORE, f"*security\n:theirs - [0:0]\n{chain}COMMIT\n"), host.enter, None, bulk.SLOW
        ),
    }


# -- packets ----------------------------------------------------------------------------------------------------------


def paths(present: list[int]) -> dict[str, packets.Path]:
    """Plain is what is there without any packet filter; iptables' tables cost something once they were made."""
    Host.packet_filter = NFTABLES
    found = {PLAIN: packets.Path(2, text="")}
    Host.packet_filter = IPTABLES
    found |= {f"{tiers} tiers": packets.Path(2, tiers) for tiers in (2, 3)}
    return found | {f"1 tier @{max(2, count)}": packets.Path(max(2, count)) for count in present}


def packet_ratios(measured: dict[str, Stats]) -> Iterator[tuple[str, float]]:
    for what in ("established", "first"):
        plain = measured[f"{what}, {PLAIN}"].median
        for name, found in measured.items():
            if name.startswith(f"{what}, ") and not name.endswith(PLAIN):
                yield f"{name} / plain", found.median / plain


# -- looks ------------------------------------------------------------------------------------------------------------


def share_of_looks(host: Host, seconds: float) -> float:
    """Of a core, by one who looks for others' changes as often as hostd does."""
    host.enter()
    table = host.kernel.table
    assert isinstance(table, IptablesFilter)
    table.settled()
    began, spent = time.monotonic(), 0.0
    while time.monotonic() < began + seconds:
        start = time.thread_time()
        if table.changed():
            raise RuntimeError("nobody changed anything")
        spent += time.thread_time() - start
        time.sleep(POLL)
    return spent / (time.monotonic() - began)


def run(n: int, present: list[int], members: int, policies: int, json: bool) -> bool:
    Host.packet_filter = IPTABLES
    ends, seconds = Endpoints(present), dict[str, list[float]]()
    groups = [*ends.groups, set_cases(members), member_cases(members), policy_cases(10) | policy_cases(policies)]
    for _ in range(endpoint.BLOCKS):
        for group in groups:
            for name, found in collect(group, max(1, n // endpoint.BLOCKS)).items():
                seconds.setdefault(name, []).extend(found)
    measured = {name: stats(found) for name, found in seconds.items()}
    looks = share_of_looks(bulk.Sets(members).host, LOOKS if n > endpoint.BLOCKS else 1)
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    measured |= packets._measured(paths(present), min(n, 31))
    bars = ends.bars() | {"set, whole / set, ipset restore": 1 / 4, "+1, whole / +1, ipset add": 1 / 10}
    ratios = {name: _ratio(measured, name) for name in bars}
    for count in (10, policies):
        name = f"policy of {count} / one chain, restored, of {count}"
        ratios[name] = _ratio(measured, name)
    ratios |= dict(packet_ratios(measured)) | {"looks / a core": looks}
    return Report("iptables", measured, ratios, bars | {"looks / a core": 0.01}).tell(json)


def _ratio(measured: dict[str, Stats], name: str) -> float:
    one, two = name.split(" / ")
    return measured[one].median / measured[two].median


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.iptables")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--present", default="1,1000,5000")
    parser.add_argument("--members", type=int, default=100_000)
    parser.add_argument("--policies", type=int, default=1000)
    given = parser.parse_args()
    present = [int(x) for x in given.present.split(",")]
    return 0 if run(given.n, present, given.members, given.policies, given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
