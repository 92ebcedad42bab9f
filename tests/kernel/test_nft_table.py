# Writing, reading back, healing, owning: the table as an object, against the real kernel.
from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from netns import Namespace, run
from nft_samples import ANY, GUARD, contents, fixed, write

from hostd.compiler.ruleset import GUEST_EGRESS, HOST_GUESTS, HOST_IN, Guard, Interface, Jump, Rule, Verdict
from hostd.dataplane.netlink import NETLINK_NETFILTER, NetlinkSocket
from hostd.dataplane.nft import Actual, Content, NftTable, TransactionRefused, fingerprint, supports_owner_persist


def _expected(content: Content) -> Actual:
    return Actual(
        skeleton_ok=True,
        chains={name: tuple(map(fingerprint, rules)) for name, rules in content.chains.items()},
        sets=dict(content.sets),
        members={name: frozenset(content.members.get(name, ())) for name in content.sets},
        classes=dict(content.classes),
        admissions=frozenset(g for a in content.admissions for g in a.grants()),
    )


def _generation() -> int:
    socket = NetlinkSocket(NETLINK_NETFILTER)
    try:
        (reply,) = socket.ask(0xA10, bytes(4))
        return int(struct.unpack_from(">I", reply.body, 8)[0])
    finally:
        socket.close()


def test_fixed_filter_reads_back(table: NftTable) -> None:
    write(table, fixed())
    assert table.read() == _expected(fixed())


@ANY
@given(content=contents())
def test_any_filter_reads_back(netns: Namespace, content: Content) -> None:
    table = NftTable(GUARD)
    table.load()
    write(table, content)
    assert table.read() == _expected(content)
    table.close()
    run("nft", "flush", "ruleset")


def test_load_that_finds_all_right_writes_nothing(table: NftTable) -> None:
    write(table, fixed())
    before = _generation()
    assert not table.load()
    table.read()
    assert _generation() == before
    other = NftTable(GUARD)
    assert not other.load()
    assert _generation() == before
    other.close()


def test_empty_transaction_writes_nothing(table: NftTable) -> None:
    before = _generation()
    table.transaction().commit()
    assert _generation() == before


def test_load_heals_a_flush(table: NftTable) -> None:
    run("nft", "flush", "ruleset")
    assert table.read() == Actual()
    assert table.load()
    assert table.read() == Actual(skeleton_ok=True)


@pytest.mark.parametrize(
    "damage",
    [
        "delete table arp slash32",
        "flush chain inet slash32 guest-from",
        "flush chain inet slash32 input\ndelete chain inet slash32 input",
        "insert rule inet slash32 forward-from accept",
        "add rule inet slash32 guest-source accept",
        "flush chain inet slash32 input\ndelete chain inet slash32 input\n"
        "add chain inet slash32 input { type filter hook input priority 7; }",
        "add chain inet slash32 input { type filter hook input priority filter - 10; policy drop; }",
    ],
)
def test_load_repairs_and_keeps_the_rest(table: NftTable, damage: str) -> None:
    write(table, fixed())
    run("nft", "-f", "-", stdin=damage)
    assert not table.read().skeleton_ok
    assert table.load()
    kept = table.read()
    assert kept.skeleton_ok
    expected = _expected(fixed())
    assert (kept.chains, kept.sets, kept.members, kept.classes) == (
        expected.chains,
        expected.sets,
        expected.members,
        expected.classes,
    )
    if "arp" not in damage:
        assert kept == expected


def test_load_replaces_a_foreign_table_of_our_name(netns: Namespace) -> None:
    run(
        "nft",
        "-f",
        "-",
        stdin="""table inet slash32 {
        set source4 { type ipv4_addr; }
        map class-from { type devgroup : verdict; flags interval; elements = { 7 : jump guest-to } }
        chain guest-to { }
        chain forward-from { ip saddr @source4 accept; iifgroup vmap @class-from; }
        chain mine { type filter hook forward priority 0; jump forward-from; }
        chain guest-from { type filter hook input priority 0; policy drop; }
    }""",
    )
    table = NftTable(GUARD)
    assert table.load()
    assert table.read().skeleton_ok
    assert not table.load()
    table.close()


def test_other_guard_replaces_rules_and_keeps_the_rest(table: NftTable) -> None:
    write(table, fixed())
    other = NftTable(Guard(prefixes=("tap",)))
    assert other.load()
    assert other.read() == _expected(fixed())
    assert not table.read().skeleton_ok
    other.close()


def test_a_rule_deleted_or_added_by_others_shows(table: NftTable) -> None:
    write(table, fixed())
    expected = _expected(fixed())
    run("nft", "add", "rule", "inet", "slash32", "c1-to", "accept")
    assert table.read().chains == {**expected.chains, "c1-to": ("? ",)}
    run("nft", "flush", "chain", "inet", "slash32", "c1-to")
    assert table.read() == expected
    run("nft", "flush", "chain", "inet", "slash32", "p-web-in")
    assert table.read().chains == {**expected.chains, "p-web-in": ()}


def test_foreign_objects_in_our_table_show_and_go(table: NftTable) -> None:
    run("nft", "add", "set", "inet", "slash32", "a-odd", "{ type ether_addr; }")
    run("nft", "add", "chain", "inet", "slash32", "odd-chain", "{ type filter hook forward priority 5; }")
    actual = table.read()
    assert actual.sets == {"a-odd": None}
    assert actual.chains == {"odd-chain": ()}
    change = table.transaction()
    change.delete_set("a-odd", 1)
    change.delete_chain("odd-chain", 2)
    change.commit()
    assert table.read() == Actual(skeleton_ok=True)


# ---- the chains of host endpoints ----

HOST_RULES = (Rule((Interface(True, "eth0"),), Verdict.DROP), Rule((), Verdict.ACCEPT))


def _put(table: NftTable, **chains: tuple[Rule, ...]) -> None:
    change = table.transaction()
    for name, rules in chains.items():
        change.put_chain(name.replace("_", "-"), rules, name)
    change.commit()


def test_chain_of_host_endpoints_shows_when_it_is_filled(table: NftTable) -> None:
    assert table.read().chains == {}
    _put(table, host_in=HOST_RULES, host_guests=(Rule((), Jump(GUEST_EGRESS)),))
    assert table.read().chains.keys() == {HOST_IN, HOST_GUESTS}
    assert table.read().chains[HOST_IN] == tuple(map(fingerprint, HOST_RULES))
    change = table.transaction()
    change.delete_chain(HOST_IN, 1)
    change.delete_chain(HOST_GUESTS, 2)
    change.commit()
    assert table.read() == Actual(skeleton_ok=True)
    assert not table.load(), "it is still there, and empty"


def test_foreign_rule_in_a_chain_of_host_endpoints_shows(table: NftTable) -> None:
    run("nft", "add", "rule", "inet", "slash32", HOST_IN, "drop")
    actual = table.read()
    assert actual.skeleton_ok
    assert actual.chains == {HOST_IN: ("? ",)}
    _put(table, host_in=())
    assert table.read() == Actual(skeleton_ok=True)


@pytest.mark.parametrize(
    "damage",
    [
        "flush chain inet slash32 input",
        "flush chain inet slash32 input-host\ndelete chain inet slash32 input-host",
        "flush chain inet slash32 guest-input\nflush chain inet slash32 host-guests\n"
        "delete chain inet slash32 host-guests",
        "flush chain inet slash32 guest-input\nflush chain inet slash32 host-guests\n"
        "delete chain inet slash32 host-guests\n"
        "add chain inet slash32 host-guests { type filter hook input priority 3; policy drop; }",
    ],
)
def test_repair_keeps_what_host_endpoints_are_asked(table: NftTable, damage: str) -> None:
    _put(table, host_in=HOST_RULES, host_guests=(Rule((), Jump(GUEST_EGRESS)),))
    run("nft", "-f", "-", stdin=damage)
    assert not table.read().skeleton_ok
    assert table.load()
    after = table.read()
    assert after.skeleton_ok
    assert after.chains.keys() == ({HOST_IN, HOST_GUESTS} if "host-guests" not in damage else {HOST_IN})
    assert not table.load()


# ---- owned ------------------------------------------------------------------------------------------------------

_CHILD = """
import sys
from hostd.dataplane.nft import NftTable
from nft_samples import ANY, GUARD, fixed, write
table = NftTable(GUARD, owned=True)
table.load()
write(table, fixed())
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not supports_owner_persist(), reason="kernel before 6.9")
def test_owned_table_stands_against_others_and_is_adopted(netns: Namespace) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    heir = NftTable(GUARD, owned=True)
    try:
        assert child.stdout.readline() == b"up\n"
        run("nft", "flush", "ruleset")
        assert heir.read().chains == _expected(fixed()).chains
        meddle = ["nft", "flush", "chain", "inet", "slash32", "p-web-in"]
        refused = subprocess.run(meddle, capture_output=True, check=False)
        assert refused.returncode
        with pytest.raises(TransactionRefused) as not_yours:
            heir.load()
        assert not_yours.value.errno == errno.EPERM
        child.kill()
        child.wait()
        assert not heir.read().skeleton_ok, "an orphan is not ours yet"
        assert heir.load()
        assert heir.read() == _expected(fixed())
        run("nft", "flush", "ruleset")
        assert heir.read() == _expected(fixed())
        assert not heir.load()
    finally:
        child.kill()
        child.wait()
        heir.close()


@pytest.mark.skipif(not supports_owner_persist(), reason="kernel before 6.9")
def test_mode_changes_both_ways(table: NftTable) -> None:
    write(table, fixed())
    owner = NftTable(GUARD, owned=True)
    assert owner.load()
    assert owner.read() == Actual(skeleton_ok=True)
    owner.close()
    assert table.load()
    assert table.read() == Actual(skeleton_ok=True)
