# Owns: the two packet filters as kernel tests need them: making one, and taking away what guards (as the control).
from __future__ import annotations

import pytest
from netns import run

from hostd.compiler.ruleset import Guard
from hostd.dataplane.filter import IPTABLES, NFTABLES, PacketFilter, opened

KINDS = (NFTABLES, IPTABLES)
chosen = NFTABLES

_OWN = {  # chains of the nf_tables skeleton, and where iptables has them: table, chain, and what lets all pass there
    "prerouting": (("raw", "PREROUTING", "-j ACCEPT"),),
    "about": (("security", "s32-about", "-g s32-onto"), ("security", "s32-about-host", "-j ACCEPT")),
    "guest-input": (("security", "s32-input-guest", "-j ACCEPT"), ("mangle", "s32-input-guest", "-j ACCEPT")),
    "forward-from": (("security", "s32-forward", "-g s32-onto"),),
}


def make(guard: Guard | None = None) -> PacketFilter:
    return opened(chosen, guard or Guard(), False, bridges)


def bridges() -> list[str]:
    return [line.split()[1].rstrip(":") for line in run("ip", "-o", "link", "show", "type", "bridge").splitlines()]


def only(kind: str, why: str) -> None:
    """What follows holds for this kind only."""
    if chosen != kind:
        pytest.skip(why)


def open_up() -> None:
    """What a third party may do on an old kernel, and here the positive control."""
    if chosen == NFTABLES:
        run("nft", "flush", "ruleset")
        return
    for table in ("raw", "mangle", "security"):
        for command in ("iptables-legacy", "ip6tables-legacy"):
            run(command, "-t", table, "-F")


def let_pass(chain: str) -> None:
    """This chain asks nothing any more."""
    if chosen == NFTABLES:
        run("nft", "insert", "rule", "inet", "slash32", chain, "accept")
        return
    for table, name, act in _OWN[chain]:
        for command in ("iptables-legacy", "ip6tables-legacy"):
            run(command, "-t", table, "-I", name, *act.split())


def still_loads() -> None:
    """What stands can be saved and loaded again by its own tools."""
    if chosen == NFTABLES:
        run("nft", "-c", "-f", "-", stdin=run("nft", "list", "ruleset"))
        return
    for command in ("iptables-legacy", "ip6tables-legacy"):
        run(f"{command}-restore", "--test", stdin=run(f"{command}-save"))
