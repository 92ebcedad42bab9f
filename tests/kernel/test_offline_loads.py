# What `slash32-hostd compile` prints is what a kernel takes: nft checks it, and the ip commands run as they stand.
from __future__ import annotations

from pathlib import Path

import pytest
from netns import Namespace, run

from hostd.compiler.ruleset import Guard
from hostd.dataplane.kernel import Kernel

GOLDEN = Path(__file__).parents[1] / "golden" / "compile-three-guests.nft"


def test_nft_takes_the_golden(netns: Namespace) -> None:
    run("nft", "-c", "-f", str(GOLDEN))
    run("nft", "-f", str(GOLDEN))
    listed = run("nft", "-nn", "list", "ruleset")
    run("nft", "-c", "-f", "-", stdin=f"flush ruleset\n{listed}")


def test_hostd_finds_in_it_what_it_would_write(netns: Namespace) -> None:
    """Read back, it is whole: no element that belongs to nothing."""
    run("nft", "-f", str(GOLDEN))
    kernel = Kernel(Guard(), owned=False)
    try:
        found = kernel.read()
    finally:
        kernel.close()
    assert not found.strays and set(found.taps) == {11, 12} and len(found.classes) == 2
    assert {"pi-db", "po-out"} <= found.chains.keys()


def test_the_ip_commands_run(netns: Namespace, peer: Namespace) -> None:
    for index, name in ((3, "up0"), (11, "vnet0"), (12, "vnet1")):
        far = "peer", "name", f"far{index}", "netns", peer.path
        run("ip", "link", "add", name, "index", str(index), "type", "veth", *far)
        run("ip", "link", "set", name, "up")
    run("ip", "address", "add", "192.0.2.1/24", "dev", "up0")
    run("ip", "address", "add", "2001:db8::1/64", "dev", "up0", "nodad")
    commands = [line[2:] for line in GOLDEN.read_text().splitlines() if line.startswith("# ip ")]
    assert len(commands) > 10
    for command in commands:
        run(*command.split())
    assert "10.66.0.0/26 via 10.65.0.3 dev vnet1 proto 132 onlink" in run("ip", "-N", "route")


def test_the_check_sees_what_is_wrong(netns: Namespace) -> None:
    """The control."""
    with pytest.raises(AssertionError):
        run("nft", "-c", "-f", "-", stdin=GOLDEN.read_text().replace("jump pi-db", "jump pi-nowhere"))
