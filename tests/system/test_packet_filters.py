# A live host goes from one packet filter to the other and back, by its configuration: no packet of an open flow is
# lost, nothing passes that did not before, and nothing of the old one stays. A host that cannot have what it is told to
# says so, and what stands in its kernel goes on.
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from deployed import Guest
from test_hitless import SECONDS, Scene, complete, flows, main_pid, scene

from lab import product
from lab.node import Node

__all__ = ["scene"]  # the fixture

TOML = "/etc/slash32/hostd.toml"
NFTABLES, IPTABLES = "nftables", "iptables"
LEGACY = "; ".join(f"update-alternatives --set {name} /usr/sbin/{name}-legacy" for name in ("iptables", "ip6tables"))


def standing(node: Node) -> dict[str, str]:
    """What is there of ours in either."""
    saved = "iptables-legacy-save; ip6tables-legacy-save"
    return {
        NFTABLES: node.sh("nft list ruleset | grep slash32 || :"),
        IPTABLES: node.sh(f"{{ {saved}; ipset list -name; }} | grep -E 's32|host-|guest-egress|pi-|po-' || :"),
    }


def has_only(node: Node, kind: str) -> None:
    def other() -> str | None:
        found = standing(node)
        gone = found[IPTABLES if kind == NFTABLES else NFTABLES]
        return gone[:500] or None if found[kind] else f"nothing of {kind}"

    problem = product.poll(other, SECONDS)
    assert problem is None, f"{node.name}: {problem}\n{product.journal_tail(node)}"


@contextmanager
def configured(scene: Scene, node: Node) -> Iterator[str]:
    """Its configuration and alternatives are as they were afterwards."""
    text = node.read(TOML)
    links = node.sh("readlink /etc/alternatives/iptables /etc/alternatives/ip6tables").split()
    try:
        yield text
    finally:
        node.write(TOML, text)
        for name, link in zip(("iptables", "ip6tables"), links, strict=True):
            node.sh(f"update-alternatives --set {name} {link}")
        product.restart(node, "slash32-hostd")
        scene.quiet()


def switch(node: Node, text: str, kind: str) -> None:
    node.write(TOML, f'{text}packet_filter = "{kind}"\n')
    product.restart(node, "slash32-hostd")


@pytest.fixture(scope="module")
def stranger(scene: Scene) -> Guest:
    """Whom nobody allows anything."""
    guest = scene.site.guest(scene.site.h1, "stranger")
    scene.site.start(guest)
    return guest


@pytest.mark.parametrize("host", ["h1", "h2"])
def test_switching_loses_nothing_and_leaves_nothing(scene: Scene, stranger: Guest, host: str) -> None:
    node = scene.site.rack.node(host)
    kinds = [NFTABLES, IPTABLES] if host not in scene.site.rack.legacy else [IPTABLES, NFTABLES]
    has_only(node, kinds[0])
    retransmitted = scene.retransmitted()
    with configured(scene, node) as text, flows(scene) as counts:
        scene.carried()
        node.sh(LEGACY)
        for kind in (kinds[1], kinds[0], kinds[1]):
            before = main_pid(node, "slash32-hostd")
            switch(node, text, kind)
            assert main_pid(node, "slash32-hostd") != before
            scene.quiet()
            has_only(node, kind)
            scene.carried()
            assert not stranger.reaches(scene.b) and not stranger.reaches(scene.far)
            assert scene.a.reaches(scene.b, "5432") and scene.a.reaches(scene.far, "5432")
    has_only(node, kinds[0])
    complete(counts)
    assert scene.retransmitted() == retransmitted


def test_what_a_host_cannot_have_it_refuses(scene: Scene) -> None:
    """It says what to do, and what stands in the kernel goes on."""
    node = scene.site.h1
    with flows(scene) as counts:
        with configured(scene, node) as text:
            node.write(TOML, f'{text}packet_filter = "iptables"\n')
            assert node.run(["systemctl", "restart", "slash32-hostd"], check=False).returncode
            said = node.run(["systemctl", "status", "--no-pager", "-l", "slash32-hostd"], check=False).stdout
            assert "Active: failed" in said and "Traceback" not in said
            assert re.search(r"packet_filter .*iptables.*nf_tables.*update-alternatives --set iptables", said), said
            has_only(node, NFTABLES)
            scene.carried()
    complete(counts)


@pytest.mark.parametrize("host", ["h1", "h2"])
def test_a_host_boots_behind_its_guard(scene: Scene, host: str) -> None:
    """At once, whoever else has asked for iptables' lock by then. (The last test here: its guests are gone.)"""
    node = scene.site.rack.node(host)
    node.reboot()
    product.wait_in_sync(scene.site.rack, [node], seconds=SECONDS)
    said = node.sh("journalctl -b -o cat --no-pager -u slash32-guard -u libvirtd")
    guard, libvirtd = (said.find(f"{verb} {unit}.service") for verb, unit in (("Finished", "slash32-guard"),
                                                                                ("Started", "libvirtd")))  # fmt: skip
    assert 0 <= guard < libvirtd and "slash32-guard.service: Failed" not in said, said
    has_only(node, IPTABLES if host in scene.site.rack.legacy else NFTABLES)
