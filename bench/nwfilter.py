# Measures slash32 against libvirt's nwfilter, both in real libvirtds (of a rack: h1 has slash32, d1 a libvirtd with
# none): what each adds to the start of an LXC guest, and how long a changed policy takes that 25 running guests use.
# Bar 8: 1/40 of what `clean-traffic` adds; 1/5,000 of `nwfilter-define`.
#   python -m bench.nwfilter [--json | --markdown] [-n STARTS] [--users 25] [--updates 3]
from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from typing import Any
from uuid import NAMESPACE_DNS, uuid5

from bench.api import Api, document
from bench.measure import Report, Stats, stats
from lab import product
from lab.domains import lxc_domain
from lab.node import Node
from lab.paths import LabError
from lab.rack import Rack

RACK = "tnwf"
BRIDGE = "br9"
OURS, THEIRS = "slash32", "nwfilter"
STARTED, UPDATED = "added to a guest's start", "policy of {} guests changed"
API = "/run/slash32-dispatcher/api.sock"
FOLDER = "/root/slash32"
FILTER = "bench-web"
SLOW = 10  # an update of ours is made so often as theirs


def filter_xml(port: int) -> str:
    """What ours does: nobody sends what is not his, ssh and one more port come in, all goes out."""

    def accept(way: str, what: str) -> str:
        return f"<rule action='accept' direction='{way}' priority='500'>{what}</rule>"

    inside = accept("in", "<tcp dstportstart='22'/>") + accept("in", f"<tcp dstportstart='{port}'/>")
    last = "<rule action='drop' direction='inout' priority='1000'><all/></rule>"
    rules = f"<filterref filter='clean-traffic'/>{inside}{accept('out', '<all/>')}{last}"
    return f"<filter name='{FILTER}' chain='root'><uuid>{uuid5(NAMESPACE_DNS, FILTER)}</uuid>{rules}</filter>"


def policy(port: int) -> dict[str, Any]:
    rules = [{"action": "Allow", "protocol": "TCP", "destination": {"ports": [each]}} for each in (22, port)]
    spec = {"selector": "has(web)", "types": ["Ingress", "Egress"], "ingress": rules, "egress": [{"action": "Allow"}]}
    return document("GlobalNetworkPolicy", FILTER, **spec)


def guest(number: int, tagged: bool, filtered: str = "", bridged: bool = False) -> str:
    """A container's XML. The kind of its NIC is what either side wants: routed for us, bridged for nwfilter."""
    mac, address = f"52:54:00:77:{number >> 8:02x}:{number & 255:02x}", f"10.65.{number >> 8}.{1 + (number & 255)}"
    target = f"lt{number}" if bridged else None  # nwfilter wants a name beforehand
    labels = {"web": "yes"}
    text = lxc_domain(f"bench{number}", mac=mac, addr4=address, labels=labels, tag=tagged, memory=32, target=target)
    if not bridged:
        return text
    ip = f"<filterref filter='{filtered}'><parameter name='IP' value='{address}'/></filterref>" if filtered else ""
    return text.replace("<interface type='ethernet'>", f"<interface type='bridge'><source bridge='{BRIDGE}'/>{ip}")


class Site:
    def __init__(self, rack: Rack) -> None:
        self.ours, self.theirs = rack.node("h1"), rack.node("d1")
        product.deploy(rack, seconds=90)
        self.theirs.sh(f"ip link add {BRIDGE} type bridge; ip link set {BRIDGE} up")
        for node in (self.ours, self.theirs):
            product.virsh(node, "lxc", "list")  # its libvirtd is up
        self._api = Api(self.theirs.sees(API))
        self.define(80)
        self.apply(policy(80))

    def define(self, port: int) -> None:
        self.theirs.write(f"{FOLDER}/filter.xml", filter_xml(port))
        product.virsh(self.theirs, "lxc", "nwfilter-define", f"{FOLDER}/filter.xml", timeout=600)

    def apply(self, what: dict[str, Any]) -> None:
        """Returns when h1's kernel has it."""
        revision = self._api.call("POST", "/v1/apply", {"documents": [what]})["revision"]
        said = self._api.call("GET", f"/v1/revisions/{revision}?wait=60")
        if said["pending"] or said["failed"]:
            raise LabError(f"revision {revision}: {said}")


def start(node: Node, xml: str) -> float:
    """Seconds of `virsh start`."""
    name = product.define(node, xml)
    began = time.perf_counter()
    product.virsh(node, "lxc", "start", name)
    return time.perf_counter() - began


def end(node: Node, xml: str) -> None:
    name = product.define(node, xml)
    product.virsh(node, "lxc", "destroy", name)
    product.virsh(node, "lxc", "undefine", name)


def starts(site: Site, n: int) -> dict[str, list[float]]:
    cases = {
        "start, routed, no slash32": (site.theirs, guest(900, False)),
        "start, routed, slash32": (site.ours, guest(900, True)),
        "start, bridged, no filter": (site.theirs, guest(900, False, bridged=True)),
        "start, bridged, clean-traffic": (site.theirs, guest(900, False, "clean-traffic", bridged=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(n + 1):
        for name in random.sample(list(cases), len(cases)):
            took = start(*cases[name])
            end(*cases[name])
            if turn:  # the first warms up
                seconds[name].append(took)
    return seconds


def updates(site: Site, users: int, n: int) -> dict[str, list[float]]:
    for number in range(users):
        start(site.theirs, guest(number, False, FILTER, bridged=True))
        start(site.ours, guest(number, True))
    product.wait_connected(site.ours, *(f"bench{number}" for number in range(users)), seconds=60)
    found: dict[str, list[float]] = {OURS: [], THEIRS: []}

    def timed(side: str, run: Callable[[], object], turn: int) -> None:
        began = time.perf_counter()
        run()
        if turn >= 0:
            found[side].append(time.perf_counter() - began)

    for turn in range(-1, n * SLOW):
        timed(OURS, lambda turn=turn: site.apply(policy(8080 + turn)), turn)  # type: ignore[misc]
        if turn >= 0 and turn % SLOW == 0:
            timed(THEIRS, lambda turn=turn: site.define(8080 + turn), turn)  # type: ignore[misc]
    return {f"{UPDATED.format(users)}, {side}": values for side, values in found.items()}


def report(seconds: dict[str, list[float]], users: int) -> Report:
    figures = {name: stats(values) for name, values in seconds.items()}
    ours, theirs = (added(figures, side) for side in (OURS, THEIRS))
    updated = UPDATED.format(users)
    ratios = {
        f"{STARTED}, {OURS} / {THEIRS}": ours / theirs,
        f"{updated}, {OURS} / {THEIRS}": figures[f"{updated}, {OURS}"].median / figures[f"{updated}, {THEIRS}"].median,
    }
    bars = dict(zip(ratios, (1 / 40, 1 / 5000), strict=True))
    return Report("nwfilter (LXC)", figures, ratios | {f"{STARTED}, {OURS}, ms": ours * 1e3}, bars)


def added(figures: dict[str, Stats], side: str) -> float:
    """To the median start."""
    base, ours = {
        OURS: ("start, routed, no slash32", "start, routed, slash32"),
        THEIRS: ("start, bridged, no filter", "start, bridged, clean-traffic"),
    }[side]
    return figures[ours].median - figures[base].median


def markdown(found: Report, users: int) -> str:
    rows = [f"| median, n | libvirt's {THEIRS} | {OURS} |", "|---|---|---|"]
    n = found.measured["start, routed, slash32"].n
    cells = [f"{added(dict(found.measured), side) * 1e3:.0f} ms, {n}" for side in (THEIRS, OURS)]
    rows.append(f"| {STARTED} | {cells[0]} | {cells[1]} |")
    one, two = (found.measured[f"{UPDATED.format(users)}, {side}"] for side in (THEIRS, OURS))
    rows.append(f"| {UPDATED.format(users)} | {one.median:.1f} s, {one.n} | {two.median * 1e3:.1f} ms, {two.n} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.nwfilter")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="the README's table")
    parser.add_argument("-n", type=int, default=15, help="starts of each kind")
    parser.add_argument("--users", type=int, default=25, help="guests that use the policy that changes")
    parser.add_argument("--updates", type=int, default=3, help="of nwfilter's; ours ten times as many")
    given = parser.parse_args()
    try:
        with product.new_rack(RACK, 1) as rack:
            site = Site(rack)
            found = report(starts(site, given.n) | updates(site, given.users, given.updates), given.users)
    except LabError as error:
        print(f"bench.nwfilter: {error}", file=sys.stderr)
        return 1
    if given.markdown:
        print(markdown(found, given.users))
        return 0
    return 0 if found.tell(given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
