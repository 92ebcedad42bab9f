# Forgetting flows, against the real conntrack table of a namespace of its own.
from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from netns import Namespace, run

from hostd.dataplane.flows import Flows
from slash32.net import parse_address, parse_prefix

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
def flows(netns: Namespace) -> Iterator[Flows]:
    for source, target in FLOWS:
        words = f"-I -p udp -s {source} -d {target} --sport 1000 --dport 2000 -t 60"
        run("conntrack", *words.split())
    made = Flows()
    yield made
    made.close()


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
    assert flows.forget(owned) == len(gone)
    assert tracked() == set(FLOWS) - set(gone)
    assert flows.forget(owned) == 0


@pytest.mark.parametrize("owned", ["10.65.0.2", "10.65.0.2/32", "fd00:65::2", "fd00:65::2/128"])
def test_all_but_tcp(flows: Flows, owned: str) -> None:
    thing = parse_prefix(owned) if "/" in owned else parse_address(owned)
    ends = ("10.65.0.2", "10.65.0.3") if "." in owned else ("fd00:65::2", "fd00:65::3")
    for source, target in (ends, ends[::-1]):
        words = f"-I -p tcp -s {source} -d {target} --sport 1000 --dport 2000 -t 60 --state ESTABLISHED"
        run("conntrack", *words.split())
    assert flows.forget_but_tcp([thing]) == 2
    assert tracked() == set(FLOWS) - {ends, ends[::-1]}
    family = "ipv4" if "." in owned else "ipv6"
    assert run("conntrack", "-L", "-f", family, "-p", "tcp").count("ESTABLISHED") == 2
    assert flows.forget_but_tcp([thing]) == 0


def test_an_address_before_translation_too(flows: Flows) -> None:
    """A guest behind natOutgoing, or one that is reached through another address."""
    for words in ("-s 10.65.0.7 -d 192.0.2.1 --src-nat 10.99.0.1", "-s 192.0.2.9 -d 10.99.0.1 --dst-nat 10.65.0.7"):
        run("conntrack", "-I", "-p", "udp", "--sport", "5", "--dport", "53", "-t", "60", *words.split())
    assert flows.forget([parse_address("10.65.0.7")]) == 2
    assert tracked() == set(FLOWS)


def test_nothing_tracked(netns: Namespace) -> None:
    flows = Flows()
    assert flows.forget([parse_address("10.65.0.2")]) == 0
    flows.close()
