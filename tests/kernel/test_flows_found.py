# Flows that the kernel finds and ends by itself: the same as those that it tells and that are ended one by one.
from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import product

import filters
import pytest
from netns import Namespace, run
from test_flows import tracked

from hostd.dataplane.flows import _FOUND_MOST, Flows
from hostd.dataplane.netlink import Refusal
from slash32.net import parse_address

NEAR = "10.65.0.2"
OTHERS = {("10.65.0.3", "10.65.0.20"), ("10.65.0.32", "10.64.0.2"), ("fd00:65::2", "fd00:65::3")}
IN_A_ZONE = ("192.0.2.7", NEAR)
OURS = {(NEAR, "10.65.0.3"), ("10.65.0.3", NEAR), (NEAR, "192.0.2.1"), ("192.0.2.1", "10.65.0.9"), IN_A_ZONE}


def open_all() -> None:
    for source, target in (OTHERS | OURS) - {("192.0.2.1", "10.65.0.9"), IN_A_ZONE}:
        run("conntrack", *f"-I -p udp -s {source} -d {target} --sport 1000 --dport 2000 -t 60".split())
    run("conntrack", *f"-I -p udp -s 192.0.2.1 -d 10.65.0.9 --sport 5 --dport 53 -t 60 --dst-nat {NEAR}".split())
    zone = "-w 5"  # somebody's who has more than one
    run("conntrack", *f"-I -p udp -s 192.0.2.7 -d {NEAR} --sport 1 --dport 2 -t 60 {zone}".split())
    assert tracked() == OTHERS | OURS


@pytest.fixture
def flows(netns: Namespace) -> Iterator[Flows]:
    guard = filters.make()
    guard.load()
    made = Flows()
    open_all()
    yield made
    made.close()
    guard.close()


def no_walk(*_: object) -> None:
    raise AssertionError("the kernel was asked to tell of flows")


@pytest.mark.parametrize("finds", [True, False])
def test_both_ways_end_the_same(flows: Flows, finds: bool) -> None:
    flows._finds = finds
    flows.forget([parse_address(NEAR)])
    assert tracked() == OTHERS
    assert finds >= flows._finds  # what was not asked is not found out


def test_no_walk_where_the_kernel_finds(flows: Flows, monkeypatch: pytest.MonkeyPatch) -> None:
    flows.forget([parse_address("10.65.0.200")])  # finds out whether it does
    if not flows._finds:
        pytest.skip("this kernel does not")
    monkeypatch.setattr(flows, "_walk", no_walk)
    flows.forget([parse_address(NEAR)])
    assert tracked() == OTHERS
    with pytest.raises(AssertionError):  # an IPv6 address, of which it has the test the wrong way round, is told of
        flows.forget([parse_address("fd00:65::2")])


def test_a_kernel_that_does_not_is_asked_once_only(flows: Flows, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it did not do is done the long way in the same call."""
    asked: list[bytes] = []
    real = flows._socket.exchange

    def exchange(batch: bytes, last: int) -> list[Refusal]:
        if len(asked) == 0:
            asked.append(batch)
            return [Refusal(last, errno.EINVAL, "")]
        return real(batch, last)

    monkeypatch.setattr(flows._socket, "exchange", exchange)
    flows.forget([parse_address(NEAR)])
    assert tracked() == OTHERS
    open_one = f"-I -p udp -s {NEAR} -d 10.65.0.4 --sport 7 --dport 8 -t 60"
    run("conntrack", *open_one.split())
    monkeypatch.setattr(flows, "_found", no_walk)
    flows.forget([parse_address(NEAR)])
    assert tracked() == OTHERS


def test_more_addresses_than_are_worth_it(flows: Flows) -> None:
    """And one of each: by the kernel, by the walk of the rest, of both families."""
    many = [f"10.71.0.{n}" for n in range(1, _FOUND_MOST + 3)]
    for address, port in product((many[0], many[-1]), (1, 2)):
        run("conntrack", *f"-I -p udp -s {address} -d 10.65.0.3 --sport {port} --dport 9 -t 60".split())
    assert len(tracked()) == len(OTHERS | OURS) + 2
    flows.forget([*map(parse_address, many), parse_address("fd00:65::2")])
    assert tracked() == (OTHERS | OURS) - {("fd00:65::2", "fd00:65::3")}
