# Log rules are heard with their tag and rate-limited, counted rules count, Goto does not come back: by real packets.
from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from frames import Frame
from netns import Namespace, run
from nft_rig import OPEN, Port, Rig

from hostd.compiler.ruleset import Family, Goto, Jump, Log, Ports, Protocol, Rule, Side, Verdict
from hostd.dataplane.nflog import LogListener
from hostd.dataplane.nft.statements import LOG_RATE
from hostd.reporting.packetlog import Logged, header
from slash32.net import parse_address
from slash32.policy import PortRange

ACCEPT, DROP = Rule((), Verdict.ACCEPT), Rule((), Verdict.DROP)


@pytest.fixture
def listener(rig: Rig) -> Iterator[LogListener]:
    made = LogListener()
    made.bind()
    yield made
    made.close()


def _to(port: int) -> tuple[Protocol, Ports]:
    return Protocol(17), Ports(Side.DST, (PortRange(port, port),))


def _policy(rig: Rig, *rules: Rule, **chains: list[Rule]) -> None:
    """What every guest is asked, as sender and as receiver both."""
    change = rig.table.transaction()
    for name, content in chains.items():
        change.put_chain(name.replace("_", "-"), content, name)
    change.put_chain("say-all", rules, 0)
    change.commit()


def _all(listener: LogListener, least: int) -> list[Logged]:
    """The kernel hands over what it has after a tenth of a second, or at sixteen; then nothing more comes."""
    import select

    found: list[Logged] = []
    while select.select([listener], [], [], 5 if len(found) < least else 0.5)[0]:
        found += listener.read()
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_log_is_heard_and_goes_on(rig: Rig, listener: LogListener, version: int) -> None:
    _policy(rig, Rule((Family(version), *_to(2000)), Log("e:web.0")), ACCEPT)
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob, version).udp(1000, 2001), rig.bob), "not logged"
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob, version).udp(1000, 2000), rig.bob)
    there, here = _all(listener, 2)  # asked at both ends
    assert there.tag == here.tag == "e:web.0"
    assert (there.indev, there.outdev) == (here.indev, here.outdev) == (rig.alice.ifindex, rig.bob.ifindex)
    assert there.mac == rig.alice.mac
    found = header(there.payload)
    assert found is not None
    ends = (rig.alice.v4, rig.bob.v4) if version == 4 else (rig.alice.v6, rig.bob.v6)
    assert (found.source, found.destination) == tuple(map(parse_address, ends))
    assert (found.protocol, found.source_port, found.port) == (17, 1000, 2000)
    assert listener.lost == 0


def test_log_before_a_drop(rig: Rig, listener: LogListener) -> None:
    _policy(rig, Rule(_to(2000), Log("e:web.0")), Rule(_to(2000), Verdict.DROP), ACCEPT)
    assert not rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1000, 2000), rig.bob)
    assert [e.tag for e in _all(listener, 1)] == ["e:web.0"]


def test_flood_is_limited_per_rule(rig: Rig, listener: LogListener) -> None:
    rate, burst = LOG_RATE
    _policy(rig, Rule(_to(2000), Log("flood"), counted=True), Rule(_to(2001), Log("calm")), DROP)
    for n in range(500):
        rig.alice.wire.send(rig.alice.to(rig.bob).udp(1000 + n, 2000))
    rig.alice.wire.send(rig.alice.to(rig.bob).udp(1000, 2001))
    rig.settle()
    found = [e.tag for e in _all(listener, burst)]
    assert burst <= found.count("flood") <= burst + 5 * rate, "a flood of well under five seconds"
    assert found.count("calm") == 1
    assert rig.table.counters()["say-all"][0][0] == 500, "all of them met the rule"


def test_groups_are_of_one_namespace(rig: Rig, listener: LogListener, peer: Namespace) -> None:
    other = LogListener()
    with pytest.raises(OSError) as busy:
        other.bind()
    assert busy.value.errno == errno.EBUSY
    other.close()
    with peer.entered():
        elsewhere = LogListener()
        elsewhere.bind()
    _policy(rig, Rule((), Log("x")), DROP)
    rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1, 2000), rig.bob)
    assert _all(listener, 1)
    assert elsewhere.read() == []
    elsewhere.close()
    listener.close()
    heir = LogListener()
    heir.bind()
    heir.close()


def test_nobody_listens_and_nothing_is_held_up(rig: Rig) -> None:
    _policy(rig, Rule((), Log("x")), ACCEPT)
    for n in range(100):
        assert rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1000 + n, 2000), rig.bob)


def test_what_a_full_listener_loses_is_counted(rig: Rig) -> None:
    listener = LogListener()
    listener.bind()
    _small(listener)
    rules = [Rule((), Log(f"r{n}")) for n in range(100)]
    _policy(rig, *rules, DROP)
    for n in range(30):
        rig.alice.wire.send(rig.alice.to(rig.bob).udp(1000 + n, 2000))
    rig.settle()
    heard = len(_all(listener, 1))
    assert 0 < heard < 2000
    _policy(rig, Rule((), Log("later")), DROP)
    rig.alice.wire.send(rig.alice.to(rig.bob).udp(7, 2000))
    later = _all(listener, 1)
    assert later[-1].tag == "later"
    assert listener.lost > 0
    assert heard + len(later) + listener.lost >= 2000, "bursts of twenty, of a hundred rules"
    listener.close()


def _small(listener: LogListener) -> None:
    import socket

    listener._socket._socket.setsockopt(socket.SOL_SOCKET, 33, 4096)


# ---- counters ---------------------------------------------------------------------------------------------------


def _send(rig: Rig, sender: Port, receiver: Port, port: int, version: int = 4) -> int:
    frame = sender.to(receiver, version).udp(1000, port)
    rig.crosses(sender, frame, receiver)
    return len(frame) - 14


def test_counted_rules_count(rig: Rig) -> None:
    _policy(
        rig,
        Rule(_to(1), Verdict.ACCEPT),
        Rule(_to(2), Verdict.CONTINUE, "would drop", counted=True),
        Rule(_to(3), Verdict.DROP, counted=True),
        ACCEPT,
    )
    assert rig.table.counters() == {"say-all": ((0, 0), (0, 0), (0, 0), (0, 0))}
    before = rig.table.read().chains
    _send(rig, rig.alice, rig.bob, 1)
    assert rig.table.counters(["say-all"])["say-all"] == ((0, 0),) * 4
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1000, 2), rig.bob), "CONTINUE goes on"
    size = _send(rig, rig.alice, rig.bob, 3)
    assert rig.table.counters(["say-all"]) == {"say-all": ((0, 0), (2, 2 * size), (1, size), (0, 0))}
    assert rig.table.read().chains == before, "a fingerprint is of the rule, not of what it counted"
    assert not rig.table.load()
    assert rig.table.counters(["say-none", "no-such"]) == {}
    run("nft", "-c", "-f", "-", stdin=run("nft", "list", "ruleset"))


# ---- goto -------------------------------------------------------------------------------------------------------


def test_goto_decides_and_jump_comes_back(rig: Rig) -> None:
    tail = [Rule(_to(1), Verdict.ACCEPT), DROP]
    _policy(rig, Rule((), Goto("t-tail")), ACCEPT, t_tail=tail)
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(9, 1), rig.bob)
    assert not rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(9, 2), rig.bob)
    _policy(rig, Rule((), Jump("t-tail")), ACCEPT, t_tail=tail[:1])
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(9, 3), rig.bob)
    _policy(rig, Rule((), Goto("t-tail")), ACCEPT, t_tail=tail[:1])
    assert not rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(9, 4), rig.bob), "back to the caller's caller: dropped"


def test_frames_of_no_known_kind_are_logged_as_they_are(rig: Rig, listener: LogListener) -> None:
    _policy(rig, Rule((), Log("odd")), DROP)
    odd: Frame = rig.alice.to(rig.bob)
    rig.alice.wire.send(odd.raw(253, b""))
    rig.alice.wire.send(odd.raw(6, b"\0"))
    rig.settle()
    for entry in _all(listener, 1):
        found = header(entry.payload)
        assert found is not None
        assert found.port is None
    assert rig.table.read().classes[OPEN]
