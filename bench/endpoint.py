# Measures: one endpoint added to a host with 1, 1,000 and 5,000 (v4 and v6 address, MAC, ARP, sysctls, neighbours,
# routes, group), from hostd's state to the kernel, on real taps. Against the floor (the same bytes, sent again), one
# `nft -f -` and one `iptables-legacy-restore` that add the classic two chains of 12 rules to as many endpoints.
# Bar 4: at 1,000 at most 1/20 of nft and 1/80 of iptables-restore; at 5,000 at most 3 times the cost at 1.
#   python -m bench.endpoint [--json] [-n N] [--present 1,1000,5000]
from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from bench.measure import Case, Report, collect, stats
from bench.rig import Host, Namespace, Recording, local, raw_sockets
from hostd.dataplane import sysctl
from hostd.dataplane.nft.admission import Admission
from slash32.net import pack_mac

SLOW = 20  # rounds per run of a peer
BLOCKS = 5
NFT_BASE = """add table ip classic
add set ip classic group { type ipv4_addr; }
add map ip classic mfrom { type ifname : verdict; }
add map ip classic mto { type ifname : verdict; }
add chain ip classic forward { type filter hook forward priority 0; policy accept; }
add rule ip classic forward iifname vmap @mfrom
add rule ip classic forward oifname vmap @mto
"""
NFT_ONE = """add chain ip classic f{i}
add chain ip classic t{i}
add rule ip classic f{i} ip saddr != {address} counter drop
add rule ip classic f{i} ct state established,related accept
add rule ip classic f{i} udp dport 67 accept
add rule ip classic f{i} ip daddr 169.254.169.254 tcp dport 80 accept
add rule ip classic f{i} tcp dport 25 counter drop
add rule ip classic f{i} counter return
add rule ip classic t{i} ct state established,related accept
add rule ip classic t{i} ip saddr @group accept
add rule ip classic t{i} tcp dport 22 counter accept
add rule ip classic t{i} tcp dport 443 ip saddr @group accept
add rule ip classic t{i} ip protocol icmp accept
add rule ip classic t{i} counter drop
add element ip classic mfrom {{ "tap{i}" : goto f{i} }}
add element ip classic mto {{ "tap{i}" : goto t{i} }}
"""
NFT_GONE = """delete element ip classic mfrom {{ "tap{i}" }}
delete element ip classic mto {{ "tap{i}" }}
delete chain ip classic f{i}
delete chain ip classic t{i}
"""
IPT_CHAINS = ":f{i} - [0:0]\n:t{i} - [0:0]\n"
IPT_ONE = """-A f{i} ! -s {address} -j DROP
-A f{i} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A f{i} -p udp --dport 67 -j ACCEPT
-A f{i} -d 169.254.169.254 -p tcp --dport 80 -j ACCEPT
-A f{i} -p tcp --dport 25 -j DROP
-A f{i} -j RETURN
-A t{i} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A t{i} -s 10.0.0.0/8 -j ACCEPT
-A t{i} -p tcp --dport 22 -j ACCEPT
-A t{i} -p tcp --dport 443 -s 10.0.0.0/8 -j ACCEPT
-A t{i} -p icmp -j ACCEPT
-A t{i} -j DROP
-A FORWARD -i tap{i} -j f{i}
-A FORWARD -o tap{i} -j t{i}
"""
IPT_GONE = """*filter
-D FORWARD -i tap{i} -j f{i}
-D FORWARD -o tap{i} -j t{i}
-F f{i}
-F t{i}
-X f{i}
-X t{i}
COMMIT
"""


def tool(argv: list[str], stdin: str) -> None:
    done = subprocess.run(argv, input=stdin.encode(), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv[0]}: {done.stderr.decode().strip()}")


def _each(template: str, numbers: range) -> str:
    return "".join(template.format(i=i, address=f"10.2.{i >> 8}.{i & 255}") for i in numbers)


def _restore(numbers: range) -> str:
    return f"*filter\n{_each(IPT_CHAINS, numbers)}{_each(IPT_ONE, numbers)}COMMIT\n"


def nft_case(present: int) -> Case:
    namespace, run = Namespace(), ["nft", "-f", "-"]
    tool(run, NFT_BASE + _each(NFT_ONE, range(present)))
    new = range(present, present + 1)
    add, remove = _each(NFT_ONE, new), _each(NFT_GONE, new)
    return Case(lambda: tool(run, add), namespace.enter_alone, lambda: tool(run, remove), SLOW)


def iptables_case(present: int) -> Case:
    namespace, run = Namespace(), ["iptables-legacy-restore", "--noflush"]
    tool(run, _restore(range(present)))
    new = range(present, present + 1)
    add, remove = _restore(new), _each(IPT_GONE, new)
    return Case(lambda: tool(run, add), namespace.enter_alone, lambda: tool(run, remove), SLOW)


def product_cases(present: int) -> dict[str, Case]:
    host = Host(present)
    one = local(present, host.tap(present))
    settings = [(s.key, sysctl.read(s.key)) for s in sysctl.tap_sysctls(f"vnet{present}")]

    def reset() -> None:
        """As a tap is born."""
        for key, value in settings:
            sysctl.write(key, value)
        host.drain()

    def then_reset(undo: Callable[[], object]) -> Callable[[], None]:
        def both() -> None:
            undo()
            reset()

        return both

    host.add(one)
    host.remove(one)  # classes are there from now on, as with any guest of a known kind
    reset()
    added, removed, sockets = Recording(), Recording(), raw_sockets()
    with added.taken():
        host.add(one)
    with removed.taken():
        host.remove(one)
    reset()
    assert one.carrier is not None
    admission = Admission(one.carrier.ifindex, pack_mac(one.endpoint.key.mac), one.endpoint.addresses)

    def admit(on: bool) -> None:
        change = host.kernel.table.transaction()
        (change.admit if on else change.expel)(admission, 0)
        change.commit()

    return {
        "whole": Case(lambda: host.add(one), host.enter, then_reset(lambda: host.remove(one))),
        "whole, floor": Case(
            lambda: added.replay(sockets), host.enter, then_reset(lambda: removed.replay(sockets))
        ),
        "filter": Case(lambda: admit(True), host.enter, lambda: admit(False)),
        "filter, floor": Case(
            lambda: added.replay(sockets, 12), host.enter, lambda: removed.replay(sockets, 12)
        ),
    }


def cases_with(present: int) -> dict[str, Case]:
    found = product_cases(present)
    found |= {"nft -f -": nft_case(present), "iptables-legacy-restore": iptables_case(present)}
    return {f"{name} @{present}": case for name, case in found.items()}


def run(n: int, present: list[int], json: bool) -> bool:
    groups = [cases_with(count) for count in present]
    seconds: dict[str, list[float]] = {}
    for _ in range(BLOCKS):  # each size by itself, or the walks of the largest would empty the caches for the smallest
        for group in groups:
            for name, found in collect(group, max(1, n // BLOCKS)).items():
                seconds.setdefault(name, []).extend(found)
    measured = {name: stats(found) for name, found in seconds.items()}

    def ratio(name: str) -> float:
        one, two = name.split(" / ")
        return measured[one].median / measured[two].median

    few, some, many = present[0], present[min(1, len(present) - 1)], present[-1]
    bar = {}
    for what in ("whole", "filter"):
        bar[f"{what} @{some} / nft -f - @{some}"] = 1 / 20
        bar[f"{what} @{some} / iptables-legacy-restore @{some}"] = 1 / 80
        bar[f"{what} @{many} / {what} @{few}"] = 3.0
    floors = [f"{what} @{count} / {what}, floor @{count}" for count in present for what in ("whole", "filter")]
    return Report("endpoint", measured, {name: ratio(name) for name in (*bar, *floors)}, bar).tell(json)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.endpoint")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=300)
    parser.add_argument("--present", default="1,1000,5000")
    given = parser.parse_args()
    return 0 if run(given.n, [int(x) for x in given.present.split(",")], given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
