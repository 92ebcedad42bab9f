# No packet before policy: guests that flood two peers from their first instruction. Under a policy that denies it
# nothing leaves their tap, in any start; under one that allows it the same frames arrive: the flood can arrive.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from deployed import FULL, Guest, Site
from sniffer import Sniffer, sniff

from lab import matrix, packets, product
from lab.node import Node
from lab.process import CommandError

STARTS = 20 if FULL else 3
SECONDS = 2  # that the flood lasts; both kinds of guest are up and open before it ends
VETH_MAC = "fe:54:00:5a:5a:5a"
POLICY = """
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: sink}
spec: {selector: role == "sink", types: [Ingress], ingress: [{action: Allow}]}
---
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: flood-yes}
spec: {selector: role == "yes", types: [Egress], egress: [{action: Allow}]}
---
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: flood-no}
spec: {selector: role == "no", types: [Egress], egress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]}
"""
# Gives every veth that appears the one MAC that the flood is addressed to, long before the container's init runs.
MAC_OF_VETHS = f"""
echo ready
while :; do
  for path in /sys/class/net/vnet*; do
    [ -e "$path" ] && ! [ -e "$path/tun_flags" ] || continue
    read -r mac < "$path/address" && [ "$mac" != {VETH_MAC} ] && ip link set "${{path##*/}}" address {VETH_MAC} || :
  done 2> /dev/null
  sleep 0.005
done
"""


@pytest.fixture(scope="module")
def sinks(site: Site) -> Iterator[list[Guest]]:
    with site.scope():
        sinks = [site.guest(site.h1, "sink"), site.guest(site.h2, "sink")]
        site.start(*sinks)
        site.apply(POLICY)
        yield sinks


def flooder(site: Site, driver: str, role: str, sinks: list[Guest]) -> tuple[Guest, bytes]:
    """A guest that floods the sinks from its first instruction, and what its frames can be told by."""
    base = site.guest(site.h1, role, driver)
    marker = f"flood-{base.name}".encode()
    to_mac = "fe" + base.mac[2:] if driver == "qemu" else VETH_MAC
    frames = []
    for sink in sinks:
        for mine, theirs in ((base.address4, sink.address4), (base.address6, sink.address6)):
            frames.append(packets.udp(to_mac, base.mac, mine, theirs, 9, data=marker))
    words = [f"s32.flood={SECONDS}", *(f"s32.frame={frame}" for frame in frames)]
    return site.guest(site.h1, role, driver, like=base, name=base.name, words=words), marker


@contextmanager
def same_mac_for_veths(node: Node) -> Iterator[None]:
    setter = node.popen(["bash", "-c", MAC_OF_VETHS])
    try:
        assert setter.stdout and setter.stdout.readline() == "ready\n"
        yield
    finally:
        setter.kill()
        setter.communicate()


def start_and_flood(site: Site, guest: Guest) -> str:
    """Returns the name of its tap, when the flood is over."""
    site.start(guest)

    def going_on() -> str | None:
        said = guest.run("cat", "/tmp/flood.log", check=False)
        return None if "sent" in said else f"{guest.name} still floods: {said!r}"

    problem = product.poll(going_on, 30)
    assert problem is None, problem
    return guest.tap


def round_of(site: Site, flooders: list[tuple[Guest, bytes]]) -> tuple[dict[str, Sniffer], list[str]]:
    with sniff(site.rack.hosts, *(marker for _, marker in flooders)) as sniffers, same_mac_for_veths(site.h1):
        taps = matrix.at_once(lambda each: start_and_flood(site, each[0]), flooders)
        for sniffer in sniffers.values():
            sniffer.frames()
    return sniffers, taps


def test_a_flood_that_is_allowed_arrives(site: Site, sinks: list[Guest]) -> None:
    flooders = [flooder(site, driver, "yes", sinks) for driver in ("qemu", "lxc")]
    sniffers, taps = round_of(site, flooders)
    for (guest, marker), tap in zip(flooders, taps, strict=True):
        assert sniffers["h1"].count(marker, tap, False) > 100, f"{guest.name} did not flood"
        for sink in sinks:
            seen = sniffers[sink.node.name]
            versions = {each.data[14] >> 4 for each in seen.frames() if (each.where, each.outgoing) == (sink.tap, True)}
            assert versions == {4, 6}, f"{guest.name} to {sink.name}: {seen.places(marker)}"


@pytest.mark.timeout(900)
def test_a_flood_that_is_denied_never_leaves_the_tap(site: Site, sinks: list[Guest]) -> None:
    flooders = [flooder(site, driver, "no", sinks) for driver in ("qemu", "lxc")]
    for number in range(STARTS):
        sniffers, taps = round_of(site, flooders)
        for (guest, marker), tap in zip(flooders, taps, strict=True):
            assert sniffers["h1"].count(marker, tap, False) > 100, f"start {number}: {guest.name} did not flood"
            assert sniffers["h1"].places(marker) == {(tap, False)}, f"start {number}: {guest.name}"
            assert sniffers["h2"].places(marker) == set(), f"start {number}: {guest.name}"
        assert flooders[0][0].reaches(sinks[1], "80"), "what its policy allows is open: the guest can speak"
        for guest, _ in flooders:
            guest.virsh("destroy", guest.name)


def test_a_flood_of_a_guest_that_no_policy_selects_never_leaves_the_tap(site: Site, sinks: list[Guest]) -> None:
    """No policy at all selects it: closed from the first instruction."""
    guest, marker = flooder(site, "lxc", "nobody", sinks)
    sniffers, taps = round_of(site, [(guest, marker)])
    assert sniffers["h1"].count(marker, taps[0], False) > 100
    assert sniffers["h1"].places(marker) == {(taps[0], False)}
    assert sniffers["h2"].places(marker) == set()


def test_refused_guests_leave_nothing(site: Site, sinks: list[Guest]) -> None:
    """A start that hostd refuses: the guest never runs, so it never floods."""
    guest, marker = flooder(site, "lxc", "yes", sinks)
    taken = site.guest(site.h1, "yes", like=sinks[1], mac=guest.mac, words=_words(guest))
    site.keep(taken)
    with sniff(site.rack.hosts, marker) as sniffers:
        with pytest.raises(CommandError, match="in use"):
            product.start(taken.node, taken.xml)
        for sniffer in sniffers.values():
            assert sniffer.places(marker) == set()


def _words(guest: Guest) -> list[str]:
    return [part.split("<")[0] for part in guest.xml.split("<initarg>") if part.startswith(("s32.flood", "s32.frame"))]
