# Forgetting flows, against the real conntrack table of a namespace of its own, where either packet filter stands.
from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import filters
import pytest
from netns import Namespace, run

from hostd.dataplane.flows import Flows
from hostd.revocation.revoke import Flow
from slash32.net import parse_address, parse_prefix
from slash32.policy import Icmp
from slash32.verdict import Packet

FLOWS = [
    ("10.65.0.2", "10.65.0.3"),
    ("10.65.0.3", "10.65.0.2"),
    ("10.65.0.3", "10.65.0.4"),
    ("10.66.0.9", "10.65.0.4"),
    ("fd00:65::2", "fd00:65::3"),
    ("fd00:65::3", "fd00:65::2"),
    ("fd00:65::3", "fd00:65::4"),
]


@pytest.fixture
def flows(netns: Namespace, packet_filter: str) -> Iterator[Flows]:
    guard = filters.make()
    guard.load()
    for source, target in FLOWS:
        words = f"-I -p udp -s {source} -d {target} --sport 1000 --dport 2000 -t 60"
        run("conntrack", *words.split())
    made = Flows()
    yield made
    made.close()
    guard.close()


def tracked() -> set[tuple[str, str]]:
    listed = run("conntrack", "-L", "-f", "ipv4") + run("conntrack", "-L", "-f", "ipv6")
    return set(re.findall(r"(?m)^udp .*? src=(\S+) dst=(\S+)", listed))


@pytest.mark.parametrize(
    ("owned", "gone"),
    [
        ([parse_address("10.65.0.2")], FLOWS[:2]),
        ([parse_address("fd00:65::2")], FLOWS[4:6]),
        ([parse_address("10.65.0.2"), parse_address("fd00:65::2")], FLOWS[:2] + FLOWS[4:6]),
        ([parse_prefix("10.66.0.0/24")], FLOWS[3:4]),
        ([parse_prefix("10.65.0.2/31")], FLOWS[:3]),
        ([parse_prefix("fd00:65::/64")], FLOWS[4:]),
        ([parse_address("10.65.0.200"), parse_prefix("10.67.0.0/16")], []),
        ([], []),
    ],
)
def test_all_flows_of_an_address_and_no_others(flows: Flows, owned: list[bytes], gone: list[tuple[str, str]]) -> None:
    assert tracked() == set(FLOWS)
    flows.forget(owned)
    assert tracked() == set(FLOWS) - set(gone)
    flows.forget(owned)
    assert tracked() == set(FLOWS) - set(gone)


@pytest.mark.parametrize("owned", ["10.65.0.2", "10.65.0.0/30", "fd00:65::2", "fd00:65::2/128"])
def test_those_that_are_condemned_and_no_others(flows: Flows, owned: str) -> None:
    """TCP of the same guests, and one of the two directions, stay."""
    thing = parse_prefix(owned) if "/" in owned else parse_address(owned)
    ends = ("10.65.0.2", "10.65.0.3") if "." in owned else ("fd00:65::2", "fd00:65::3")
    words = f"-I -p tcp -s {ends[0]} -d {ends[1]} --sport 1000 --dport 2000 -t 60 --state ESTABLISHED"
    run("conntrack", *words.split())
    seen: list[Packet] = []

    def condemned(flow: Flow) -> bool:
        seen.append(flow.packet)
        return flow.packet.protocol == 17 and flow.packet.source == parse_address(ends[0])

    assert flows.end([thing], condemned) == 1
    assert tracked() == set(FLOWS) - {ends}
    family = "ipv4" if "." in owned else "ipv6"
    assert run("conntrack", "-L", "-f", family, "-p", "tcp").count("ESTABLISHED") == 1
    a, b = map(parse_address, ends)
    assert {Packet(a, b, 6, 1000, 2000), Packet(a, b, 17, 1000, 2000), Packet(b, a, 17, 1000, 2000)} <= set(seen)
    assert flows.end([thing], condemned) == 0


def test_what_began_a_flow_is_seen_as_the_filter_saw_it(flows: Flows) -> None:
    for words in (
        "-p udp -s 10.65.0.7 -d 192.0.2.1 --sport 5 --dport 53 --src-nat 10.99.0.1",
        "-p udp -s 192.0.2.9 -d 10.99.0.1 --sport 6 --dport 54 --dst-nat 10.65.0.7:80",
        "-p icmp -s 10.65.0.7 -d 192.0.2.1 --icmp-type 8 --icmp-code 0 --icmp-id 9",
        "-p sctp -s 10.65.0.7 -d 192.0.2.1 --sport 7 --dport 55 --state ESTABLISHED --orig-vtag 1 --reply-vtag 2",
        "-p gre -s 10.65.0.7 -d 192.0.2.1 --srckey 3 --dstkey 4",
        "-p 99 -s 10.65.0.7 -d 192.0.2.1",
    ):
        run("conntrack", "-I", "-t", "60", *words.split())
    seen: set[Packet] = set()
    assert flows.end([parse_address("10.65.0.7")], lambda flow: seen.add(flow.packet) or False) == 0
    guest, far = parse_address("10.65.0.7"), parse_address("192.0.2.1")
    assert seen == {
        Packet(guest, far, 17, 5, 53),
        Packet(parse_address("192.0.2.9"), guest, 17, 6, 80),
        Packet(guest, far, 1, icmp=Icmp(8, 0)),
        Packet(guest, far, 132, 7, 55),
        Packet(guest, far, 47),
        Packet(guest, far, 99),
    }


def test_more_than_one_batch(flows: Flows, tmp_path: Path) -> None:
    words = "-I -p udp -s 10.70.0.1 -d 10.70.{}.{} --sport 1000 --dport 2000 -t 60\n"
    many = tmp_path / "many"
    many.write_text("".join(words.format(n // 250, n % 250) for n in range(2500)))
    run("conntrack", "--load-file", str(many))
    assert flows.end([parse_prefix("10.70.0.0/16")], lambda flow: flow.packet.destination[3] != 7) == 2490
    assert len(tracked() - set(FLOWS)) == 10


def test_an_address_before_translation_too(flows: Flows) -> None:
    """A guest behind natOutgoing, or one that is reached through another address."""
    for words in ("-s 10.65.0.7 -d 192.0.2.1 --src-nat 10.99.0.1", "-s 192.0.2.9 -d 10.99.0.1 --dst-nat 10.65.0.7"):
        run("conntrack", "-I", "-p", "udp", "--sport", "5", "--dport", "53", "-t", "60", *words.split())
    assert len(tracked() - set(FLOWS)) == 2
    flows.forget([parse_address("10.65.0.7")])
    assert tracked() == set(FLOWS)


def test_nothing_tracked(netns: Namespace) -> None:
    flows = Flows()
    flows.forget([parse_address("10.65.0.2")])
    flows.close()


def test_systemd_hears_of_a_long_walk(flows: Flows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A guest that opens all the flows it may cannot have hostd killed for judging them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        near = [parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/8")]
        assert flows.end(near, lambda _: False) == 0
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
        monkeypatch.setattr("hostd.dataplane.flows._BEAT", len(FLOWS) - 1)
        assert flows.end(near, lambda _: False) == 0
        said = systemd.recv(100)
        assert b"WATCHDOG=1" in said and b"EXTEND_TIMEOUT_USEC=" in said
