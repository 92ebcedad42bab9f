"""The wires of a rack: the tor namespace with its bridge, and one network namespace for each node, plugged into it.

Owns the network namespaces whose names begin with "s32-" and their links; none of them has a way out of the machine.
"""

from __future__ import annotations

from pathlib import Path

from lab.process import run

TOR_ADDRESS, TOR_ADDRESS6 = "10.99.0.1", "fd99::1"


def exists(netns: str) -> bool:
    return Path("/run/netns", netns).exists()


def batch(netns: str, lines: list[str], force: bool = False) -> None:
    """Run `ip` command lines in one process, in NETNS."""
    options = ["-force"] if force else []
    run(["ip", "-n", netns, *options, "-batch", "-"], netns, input="\n".join(lines) + "\n", check=not force)


def make_tor(netns: str) -> None:
    """A bridge br0 with 10.99.0.1/24 and fd99::1/64, forwarding."""
    run(["ip", "netns", "add", netns], netns)
    switches = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv6.conf.default.accept_dad=0"]
    run(["ip", "netns", "exec", netns, "sysctl", "-qw", *switches], netns)
    lines = ["link set lo up", "link add br0 type bridge mcast_snooping 0", f"addr add {TOR_ADDRESS}/24 dev br0"]
    batch(netns, [*lines, f"addr add {TOR_ADDRESS6}/64 dev br0 nodad", "link set br0 up"])


def plug(netns: str, tor: str, name: str, index: int) -> None:
    """A fresh namespace NETNS with eth0, the other end of which is port p-NAME of the bridge. A NIC keeps its MAC when
    the power goes: the neighbours would go on sending to the old one."""
    port = f"p-{name}"
    run(["ip", "netns", "add", netns], netns)
    batch(
        netns,
        [
            "link set lo up",
            f"link add eth0 address 02:53:32:00:00:{index:02x} type veth peer name {port} netns {tor}",
            f"addr add 10.99.0.{index}/24 dev eth0",
            f"addr add fd99::{index}/64 dev eth0 nodad",
            "link set eth0 up",
            f"route add default via {TOR_ADDRESS}",
            f"route add default via {TOR_ADDRESS6}",
        ],
    )
    batch(tor, [f"link set {port} master br0 up"])


def unplug(netns: str, tor: str, name: str) -> None:
    """Remove the node's namespace and its port (the links in it go with it)."""
    if exists(tor):
        batch(tor, [f"link del p-{name}"], force=True)
    remove(netns)


def remove(netns: str) -> None:
    if exists(netns):
        run(["ip", "netns", "del", netns], netns)
