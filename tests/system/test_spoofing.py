# Spoofing from inside guests, QEMU and LXC: each frame of forged.py is sent, and seen at the guest's tap and nowhere
# else on either host, nor by the host's own stack; without its rule (hostd stopped, it would heal it) it arrives.
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv6Address

import pytest
from deployed import Guest, Site
from forged import FAR, HOST, INPUT, KERNEL, NEAR, NOTHING, SOURCE, TWICE, Case, Peer, Scene, cases
from sniffer import LOCAL, Sniffer, sniff

from lab import matrix, packets, product
from lab.node import Node

POLICY = """
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: open}
spec: {selector: role == "open", types: [Ingress, Egress], ingress: [{action: Allow}], egress: [{action: Allow}]}
"""
Sniffers = dict[str, Sniffer]


class Stage:
    """Two attackers on h1, the others' taps, and everybody's frames."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.h1 = site.h1
        self.near, self.far = site.guest(site.h1, "open"), site.guest(site.h2, "open")
        self.attackers = [site.guest(site.h1, "open", driver) for driver in ("qemu", "lxc")]
        site.start(self.near, self.far, *self.attackers)
        site.apply(POLICY)
        self.taps = {guest.name: guest.tap for guest in (self.near, self.far, *self.attackers)}

    def scene(self, attacker: Guest) -> Scene:
        def peer(guest: Guest) -> Peer:
            return Peer({4: guest.address4, 6: guest.address6}, guest.mac)

        def node(which: Node) -> Peer:
            return Peer({4: which.address, 6: which.address6})

        outside = node(self.site.d1)
        return Scene(self.tap_mac(attacker), peer(attacker), peer(self.near), peer(self.far), node(self.h1), outside)

    def tap_mac(self, guest: Guest) -> str:
        return self.h1.read(f"/sys/class/net/{self.taps[guest.name]}/address").strip()

    def place(self, case: Case) -> tuple[str, bool]:
        return {NEAR: (self.taps[self.near.name], True), FAR: ("eth0", True), HOST: (LOCAL, False)}[case.arrives]

    def elsewhere(self, sniffers: Sniffers, attacker: Guest, case: Case) -> set[tuple[str, str, bool]]:
        """Wherever the frame was seen, but for the tap through which it came."""
        seen = {(name, *place) for name, sniffer in sniffers.items() for place in sniffer.places(case.marker)}
        came = ("h1", self.taps[attacker.name], False)
        assert came in seen, f"{attacker.name}: {case.name}: was not sent"
        if case.stopped_by == KERNEL:  # it may complain to itself, the forged source
            seen -= {("h1", "lo", True), ("h1", "lo", False), ("h1", LOCAL, False)}
        return seen - {came}

    def send(self, guest: Guest, frames: Sequence[str]) -> None:
        """Returns when the host has seen them all: a ping that follows them through the same queue has arrived."""
        for first in range(0, len(frames), 24):
            lines = "".join(f"2 100 {frame}\n" for frame in frames[first : first + 24])
            assert guest.run("frames", input=lines).split() == ["2", "0"] * lines.count("\n")
        assert guest.reaches(self.near, ms=2000)

    def send_all(self, sent: list[tuple[Guest, list[Case]]]) -> None:
        matrix.at_once(lambda pair: self.send(pair[0], [case.frame for case in pair[1]]), sent)


@pytest.fixture(scope="module")
def stage(site: Site) -> Iterator[Stage]:
    with site.scope():
        yield Stage(site)


@contextmanager
def defenceless(stage: Stage) -> Iterator[None]:
    """hostd is stopped, so that a rule taken away stays away; at the end it runs and everything is as before."""
    before = ruleset(stage.h1)
    confs = [f"/proc/sys/net/ipv4/conf/{tap}" for tap in (*(stage.taps[a.name] for a in stage.attackers), "all")]
    old = [stage.h1.read(f"{conf}/rp_filter").strip() for conf in confs]
    stage.h1.run(["systemctl", "kill", "-s", "STOP", "slash32-hostd"])
    try:
        stage.h1.sh("".join(f"echo 0 > {conf}/rp_filter;" for conf in confs))
        yield
    finally:
        restore = "".join(f"echo {value} > {conf}/rp_filter;" for conf, value in zip(confs, old, strict=True))
        stage.h1.sh(f"{restore} systemctl kill -s CONT slash32-hostd")

        def differs() -> str | None:
            now = ruleset(stage.h1)
            return None if now == before else f"hostd has not healed: {set(now) ^ set(before)}"

        problem = product.poll(differs, 20)
        assert problem is None, problem


def ruleset(node: Node) -> list[str]:
    """The tables' lines, sorted; without the connections and questions that are counted."""
    text = re.sub(r"(?s)(set (?:conns|asks) \{[^}]*?)elements = \{.*?\}\n", r"\1", node.sh("nft list ruleset"))
    return sorted(line.strip() for line in text.splitlines())


def take_away(node: Node, what: str) -> None:
    """The rules that stop this class of frames."""
    if what == SOURCE:
        node.sh("nft insert rule inet slash32 guest-source accept")
    elif what == TWICE:
        node.sh("nft 'insert rule inet slash32 guest-from accept; insert rule inet slash32 guest-to accept'")
    elif what == INPUT:
        node.sh("nft insert rule inet slash32 guest-input accept")
    else:
        listed = node.sh("nft -a list table inet slash32")
        found = re.findall(r"(?m)^\tchain (\S+) \{|" + rf"comment \"{re.escape(what)}\" # handle (\d+)", listed)
        chain, script = "", ""
        for name, handle in found:
            chain = name or chain
            if handle:
                script += f"delete rule inet slash32 {chain} handle {handle};"
        assert script, f"no rule says {what!r}"
        node.sh(f"nft '{script}'")


def test_forged_frames_go_nowhere_and_rightful_ones_arrive(stage: Stage) -> None:
    routes = stage.h1.sh("ip route; ip -6 route")
    wrong, total = [], 0
    sent = [(attacker, cases(stage.scene(attacker), attacker.name)) for attacker in stage.attackers]
    with sniff(stage.site.rack.hosts, *(case.marker for _, each in sent for case in each)) as sniffers:
        stage.send_all(sent)
        for attacker, each in sent:
            for case in each:
                total += 1
                seen = stage.elsewhere(sniffers, attacker, case)
                if case.stopped_by == NOTHING and ("h1", *stage.place(case)) not in seen:
                    wrong.append(f"{attacker.driver}: {case.name}: did not arrive, only at {seen}")
                elif case.stopped_by != NOTHING and seen:
                    wrong.append(f"{attacker.driver}: {case.name}: leaked to {seen}")
    assert not wrong, "\n".join(wrong)
    assert total > 120
    assert stage.h1.sh("ip route; ip -6 route") == routes, "no advertisement, no redirect was believed"


def test_each_forged_frame_arrives_once_its_rule_is_taken_away(stage: Stage) -> None:
    guards = dict.fromkeys(case.stopped_by for case in cases(stage.scene(stage.attackers[0]), "x"))
    wrong = []
    for guard in guards:
        if guard in (NOTHING, KERNEL):
            continue
        sent = [
            (attacker, [c for c in cases(stage.scene(attacker), f"{attacker.name}-bare") if c.stopped_by == guard])
            for attacker in stage.attackers
        ]
        markers = [case.marker for _, each in sent for case in each]
        with defenceless(stage), sniff([stage.h1], *markers) as sniffers:
            stage.send_all(sent)
            closed = {name: sniffer.frames() for name, sniffer in sniffers.items()}
            assert all(not each.outgoing and each.where != LOCAL for each in closed["h1"]), f"{guard}: not by rp_filter"
            with sniff([stage.h1], *markers) as bare:
                take_away(stage.h1, guard)
                stage.send_all(sent)
                for attacker, each in sent:
                    for case in each:
                        seen = stage.elsewhere(bare, attacker, case)
                        if ("h1", *stage.place(case)) not in seen:
                            wrong.append(f"{attacker.driver}: {case.name}: without {guard!r} seen at {seen}")
    assert not wrong, "\n".join(wrong)


# -- ARP and neighbour discovery: what counts is what the host believes, and whom it answers --------------------------


def neighbours(node: Node) -> dict[tuple[str, str], str]:
    """{(address, interface): MAC} as the host believes it."""
    found = re.findall(r"(?m)^(\S+) dev (\S+) lladdr (\S+)", node.sh("ip neigh; ip -6 neigh"))
    return {(address, dev): mac for address, dev, mac in found if not address.startswith("fe80:")}


def advertisement(ends: tuple[str, str, str, str], target: str) -> str:
    """A neighbour advertisement: TARGET is at the sender's MAC; override."""
    option = b"\x02\x01" + bytes.fromhex(ends[1].replace(":", ""))
    return packets.icmp_message(ends, 136, b"\x20\0\0\0" + IPv6Address(target).packed + option)


def solicitation(mac: str, source: str, target: str) -> str:
    """Who has TARGET, to all nodes (as a router would be found), from SOURCE at this MAC."""
    option = b"\x01\x01" + bytes.fromhex(mac.replace(":", ""))
    address = IPv6Address(target)
    group = IPv6Address(IPv6Address("ff02::1:ff00:0").packed[:13] + address.packed[13:])
    to = "33:33:" + group.packed[12:].hex(":")
    return packets.icmp_message((to, mac, source, str(group)), 135, bytes(4) + address.packed + option)


def lies(stage: Stage, scene: Scene) -> list[str]:
    """ARP and ND for others: another guest's, nobody's, the host's and its gateway's addresses."""
    me, mac = scene.attacker, scene.attacker.mac
    frames = []
    for address in (scene.near.address[4], scene.far.address[4], "10.65.200.200", stage.h1.address, "10.99.0.1"):
        frames += [
            packets.arp(mac, address, address),  # gratuitous
            packets.arp(mac, address, address, reply=True),
            packets.arp(mac, address, stage.h1.address, reply=True),
            packets.arp(mac, address, "169.254.1.1"),  # asks in its name
            packets.arp("52:54:00:66:fe:fe", address, "169.254.1.1"),
        ]
    frames.append(packets.arp(mac, me.address[4], stage.h1.address, reply=True, sender_mac=scene.near.mac))
    frames.append(packets.arp(mac, me.address[4], "169.254.1.1", sender_mac=scene.near.mac))
    for address in (scene.near.address[6], scene.far.address[6], "fd00:65::dead", stage.h1.address6, "fd99::1"):
        for source in (scene.link_local, me.address[6], address):
            frames.append(advertisement((scene.tap_mac, mac, source, "fe80::1"), address))
            frames.append(advertisement(("33:33:00:00:00:01", mac, source, "ff02::1"), address))
        frames.append(solicitation(mac, address, "fe80::1"))
    return frames


def forged_addresses(scene: Scene) -> list[str]:
    others = [*scene.near.address.values(), *scene.far.address.values(), *scene.host.address.values()]
    return [*others, "10.65.200.200", "fd00:65::dead", "10.99.0.1", "fd99::1"]


def answered(sniffers: Sniffers, tap: str) -> set[str]:
    """Whom the host answered through the tap: ARP replies' and advertisements' targets."""
    found = set()
    for each in sniffers["h1"].frames():
        if each.where != tap or not each.outgoing:
            continue
        if each.data[12:14] == b"\x08\x06" and each.data[21] == 2:
            found.add(".".join(map(str, each.data[38:42])))
        elif each.data[12:14] == b"\x86\xdd" and each.data[20] == 58 and each.data[54] == 136:
            found.add(str(IPv6Address(each.data[38:54])))
    return found


ARP, ND = b"\x08\x06\0\x01\x08\0\x06\x04", b"\x3a\xff\xfe\x80"  # of every ARP packet; of ND from the host


def test_arp_and_nd_for_others_are_not_believed(stage: Stage) -> None:
    for attacker in stage.attackers:
        scene, tap = stage.scene(attacker), stage.taps[attacker.name]
        before = neighbours(stage.h1)
        stage.h1.sh(f"echo 1 > /proc/sys/net/ipv4/conf/{tap}/arp_accept")
        try:
            with sniff([stage.h1], ARP, ND) as sniffers:
                stage.send(attacker, lies(stage, scene))
                believed = neighbours(stage.h1)
                assert answered(sniffers, tap) & set(forged_addresses(scene)) == set(), "the host answered a liar"
        finally:
            stage.h1.sh(f"echo 0 > /proc/sys/net/ipv4/conf/{tap}/arp_accept")
        forged = set(forged_addresses(scene))
        assert {k: v for k, v in believed.items() if k[1] == tap and k[0] in forged} == {}
        assert {k: believed.get(k, v) for k, v in before.items()} == before, "nobody's entry changed"
        truth(stage, scene, attacker, tap)


def truth(stage: Stage, scene: Scene, attacker: Guest, tap: str) -> None:
    """The positive control: it may ask in its own name, for others too, and is answered."""
    asks = [packets.arp(scene.attacker.mac, attacker.address4, each) for each in ("169.254.1.1", stage.far.address4)]
    asks.append(solicitation(scene.attacker.mac, attacker.address6, "fe80::1"))
    with sniff([stage.h1], ARP, ND) as sniffers:
        stage.send(attacker, asks)
        assert answered(sniffers, tap) == {attacker.address4, attacker.address6}


OPENED = "arp slash32 input", "inet slash32 prerouting", "inet slash32 input"


def test_arp_and_nd_for_others_are_believed_without_their_rules(stage: Stage) -> None:
    for attacker in stage.attackers:
        scene, tap = stage.scene(attacker), stage.taps[attacker.name]
        with defenceless(stage), sniff([stage.h1], ARP, ND) as sniffers:
            accept = f"echo 1 > /proc/sys/net/ipv4/conf/{tap}/arp_accept"
            hooks = "".join(f"insert rule {hook} accept;" for hook in OPENED)
            stage.h1.sh(f"{accept}; nft '{hooks}'")
            try:
                stage.send(attacker, lies(stage, scene))
                believed = {address for address, dev in neighbours(stage.h1) if dev == tap}
            finally:
                stage.h1.sh(f"echo 0 > /proc/sys/net/ipv4/conf/{tap}/arp_accept; ip neigh flush dev {tap}")
        wanted = {scene.near.address[4], scene.far.address[4], "10.65.200.200", scene.near.address[6], "fd00:65::dead"}
        assert wanted <= believed, wanted - believed
        assert wanted <= answered(sniffers, tap), "and answers the liar"
