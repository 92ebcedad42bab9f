# What only iptables-legacy and ipset can be attacked with: names of interfaces that mean something to its tools, a
# table of its own that fills. Each attack has its control.
from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import filters
import pytest
from filters import let_pass
from frames import Frame, solicitation
from netns import Namespace, run
from nft_rig import OPEN, Port, Rig

from hostd.compiler.ruleset import Rule, Verdict
from hostd.dataplane.filter import IPTABLES
from hostd.dataplane.iptables import restore, steps
from hostd.dataplane.nft import TransactionRefused


@pytest.fixture
def rig(netns: Namespace, peer: Namespace) -> Iterator[Rig]:
    filters.chosen = IPTABLES
    try:
        made = Rig(peer)
        yield made
        made.close()
    finally:
        filters.chosen = filters.NFTABLES


def named(rig: Rig, name: str) -> Port:
    """A guest on a tap of this name, let in, with a network behind it."""
    dave = rig.attach(4, name, "10.65.0.4", "fd00:65::4")
    dave.behind = ("10.66.4.0/26", "fd00:66:4::/64")
    change = rig.table.transaction()
    change.admit(dave.admission, 0)
    change.commit()
    rig.group(dave, OPEN)
    return dave


@pytest.mark.parametrize("name", ['vnet"4', "vnet'4", "vnet\\4", 'vnet\\"', "vnet$(id)", "vnet`id`", "vnet!", "vnet#4"])
def test_no_name_of_a_tap_stops_the_others(rig: Rig, name: str) -> None:
    dave = named(rig, name)
    assert rig.crosses(dave, dave.to(rig.bob).udp(1, 2), rig.bob)
    assert not rig.crosses(dave, dave.to(rig.bob).but(source=rig.alice.v4).udp(1, 2), rig.bob)
    run("ip", "-4", "route", "add", "10.66.4.5", "via", dave.v4, "dev", name, "onlink")
    flow = rig.bob.to("10.66.4.5")
    assert rig.crosses(rig.bob, flow.udp(5, 6), dave)
    error = dave.to(rig.bob).icmp(3, 3, bytes(4) + flow.udp(5, 6)[14:])
    assert rig.crosses(dave, error, rig.bob), "an error about what lies behind it"
    assert rig.table.read().skeleton_ok and not rig.table.load()


def test_a_name_that_means_many_is_one(rig: Rig) -> None:
    """iptables reads "vnet+" as every tap."""
    dave = named(rig, "vnet+")
    run("ip", "-4", "route", "add", "10.66.4.5", "via", dave.v4, "dev", "vnet+", "onlink")
    flow = rig.bob.to("10.66.4.5")
    assert rig.crosses(rig.bob, flow.udp(5, 6), dave)
    error = rig.alice.to(rig.bob).icmp(3, 3, bytes(4) + flow.udp(5, 6)[14:])
    assert not rig.crosses(rig.alice, error, rig.bob), "it is not about alice's"
    rig.group(dave, 0)
    change = rig.table.transaction()
    with pytest.raises(TransactionRefused, match="rename it"):
        change.exempt(dave.ifindex, True, 0)
    rig.group(rig.alice, 0)
    assert not rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1, 2), rig.bob)


@contextmanager
def before_others() -> Iterator[None]:
    """This process has the processor, where that is allowed."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_one_guest_fills_no_table_of_questions(rig: Rig) -> None:
    """Whoever asks from link-local addresses, more of them than are measured, silences no neighbour's own address."""
    frame = Frame(rig.carol.mac, bytes.fromhex("3333ff000001"), "fe80::1:0", "ff02::1:ff00:1", 255)
    whole = bytearray(frame.icmp(135, 0, solicitation("fe80::1")))
    asks = Frame(rig.alice.mac, bytes.fromhex("3333ff000001"), rig.alice.v6, "ff02::1:ff00:1", 255)
    question = asks.icmp(135, 0, solicitation("fe80::1"))
    others = itertools.count(1)

    def answers_another() -> bool:
        """One that was not measured before."""
        source = f"fe80::9:0:{next(others)}"
        run("ip", "neigh", "replace", source, "lladdr", rig.alice.mac.hex(":"), "dev", "vnet1", "nud", "permanent")
        return bool(rig.answer(rig.alice, asks.but(source=source).icmp(135, 0, solicitation("fe80::1"))))

    def is_full() -> bool:
        """What was measured five seconds ago is forgotten: it must not take longer, however busy the machine is."""
        with before_others():
            for number in range(70_000):  # hashlimit measures 65,536 at most
                whole[34:38] = (number + 1).to_bytes(4, "big")  # of the source; nobody looks at the checksum
                rig.carol.wire.send(whole)
                if number % 100 == 0:
                    rig.settle()
                    rig.carol.heard()
        assert rig.answer(rig.alice, question)
        return not answers_another()

    assert any(is_full() for _ in range(5)), "the control"
    let_pass("guest-input")
    assert answers_another()


@pytest.mark.parametrize("table", ["raw", "mangle", "security"])
@pytest.mark.parametrize("command", ["iptables-legacy", "ip6tables-legacy"])
def test_who_comes_before_us_is_noticed_and_comes_after_us(rig: Rig, table: str, command: str) -> None:
    version = 4 if command == "iptables-legacy" else 6
    lie = rig.alice.to(rig.bob, version).but(source=rig.carol.v4 if version == 4 else rig.carol.v6)
    hook = "PREROUTING" if table == "raw" else "FORWARD"
    rig.table.settled()
    assert not rig.table.changed()
    run(command, "-t", table, "-I", hook, "-j", "ACCEPT")
    assert rig.crosses(rig.alice, lie.udp(1, 2), rig.bob) == (table == "raw")
    assert rig.table.changed()
    assert rig.table.load()
    assert not rig.crosses(rig.alice, lie.udp(1, 3), rig.bob)
    assert f"-A {hook} -j ACCEPT" in run(command, "-t", table, "-S", hook), "it is others', and stays"


def test_a_gate_that_was_left_closed_opens_when_all_was_compared(rig: Rig) -> None:
    """hostd was killed while policies changed: also where nothing else is left to do."""
    for version in (4, 6):
        restore.write(version, steps._closing(version))
    assert not rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1, 2), rig.bob)
    rig.table.close()
    rig.table = filters.make()
    rig.table.load()
    assert not rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1, 3), rig.bob)
    change = rig.table.transaction()
    change.sweep(rig.table.read().strays, 0)
    change.commit()
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1, 4), rig.bob)


def test_what_others_changed_just_before_our_own_write_is_noticed(rig: Rig) -> None:
    rig.table.settled()
    run("iptables-legacy", "-t", "raw", "-F", "PREROUTING")
    change = rig.table.transaction()
    change.put_chain("pi-new", [Rule((), Verdict.ACCEPT)], 0)
    change.commit()
    assert rig.table.changed()
    assert rig.table.load() and not rig.table.changed()
    change = rig.table.transaction()
    change.put_chain("pi-new", [Rule((), Verdict.DROP)], 0)
    change.commit()
    assert not rig.table.changed(), "our own write is none of others'"


def test_a_rule_in_the_place_of_ours_is_found_by_whoever_reads(rig: Rig) -> None:
    """Sizes do not tell of it; hostd reads all once a minute."""
    lie = rig.alice.to(rig.bob).but(source=rig.carol.v4)
    saved = run("iptables-legacy", "-t", "raw", "-S", "s32-guest").splitlines()
    number = next(n for n, line in enumerate(saved) if line.endswith("-j DROP"))
    comment = saved[number].split('"')[1]
    accept = "-m", "comment", "--comment", comment.replace("not", "NOT"), "-j", "ACCEPT"
    run("iptables-legacy", "-t", "raw", "-R", "s32-guest", str(number), *accept)
    assert rig.crosses(rig.alice, lie.udp(1, 2), rig.bob)
    assert not rig.table.read().skeleton_ok and rig.table.load()
    assert not rig.crosses(rig.alice, lie.udp(1, 3), rig.bob)
