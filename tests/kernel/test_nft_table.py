# Writing, reading back, refusing, healing, owning: the table as an object, against the real kernel.
from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from netns import Namespace, run
from nft_samples import GUARD, contents, fixed, prefixes, write

from hostd.compiler.ruleset import (
    GUEST_EGRESS,
    HOST_GUESTS,
    HOST_IN,
    Guard,
    InSet,
    Interface,
    Jump,
    Rule,
    SetKind,
    SetSpec,
    Side,
    Verdict,
)
from hostd.dataplane.netlink import NETLINK_NETFILTER, NetlinkSocket
from hostd.dataplane.nft import (
    Actual,
    Admission,
    Content,
    NftTable,
    TransactionRefused,
    disjoint,
    fingerprint,
    supports_owner_persist,
)
from slash32.net import parse_address, parse_prefix

COUNT = 300 if os.environ.get("SLASH32_COUNTS") == "full" else 30
ANY = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
DROP = Rule((), Verdict.DROP)
MAC = bytes.fromhex("525400000001")
ALICE = Admission(7, MAC, (parse_address("10.0.0.1"), parse_address("fd00::1")), (parse_prefix("10.1.0.0/24"),))


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


@pytest.fixture
def table(netns: Namespace) -> NftTable:
    made = NftTable(GUARD)
    made.load()
    yield made
    made.close()


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


# ---- endpoints --------------------------------------------------------------------------------------------------


def _do(table: NftTable, **what: Admission) -> None:
    change = table.transaction()
    for name, admission in what.items():
        getattr(change, name)(admission, name)
    change.commit()


def test_admission_comes_and_goes(table: NftTable) -> None:
    _do(table, admit=ALICE)
    _do(table, admit=ALICE)
    assert table.read().admissions == frozenset(ALICE.grants())
    less = Admission(7, MAC, ALICE.addresses[:1])
    _do(table, expel=ALICE, admit=less)
    assert table.read() == Actual(skeleton_ok=True, admissions=frozenset(less.grants()))
    _do(table, expel=less)
    assert table.read() == Actual(skeleton_ok=True)
    with pytest.raises(TransactionRefused) as refused:
        _do(table, expel=less)
    assert refused.value.label == "expel"


def test_admission_that_lost_an_element_is_swept_and_admitted_again(table: NftTable) -> None:
    _do(table, admit=ALICE)
    run("nft", "flush", "set", "arp", "slash32", "senders")
    actual = table.read()
    assert actual.admissions == {(7, MAC, ALICE.addresses[1])}  # v6 alone needs no ARP
    assert {e.set for e in actual.strays} == {"source4", "behind4", "senders-behind"}
    change = table.transaction()
    change.sweep(actual.strays, "sweep")
    change.admit(ALICE, "admit")
    change.commit()
    assert table.read() == Actual(skeleton_ok=True, admissions=frozenset(ALICE.grants()))


def test_an_endpoint_is_plain_elements_only(table: NftTable) -> None:
    change = table.transaction()
    change.admit(ALICE, "a")
    kinds = {struct.unpack_from("=H", m, 4)[0] for m in change._messages}
    assert kinds == {0xA00 | 12}


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_refusal_names_the_label_and_changes_nothing(table: NftTable) -> None:
    write(table, fixed())
    before = table.read()
    change = table.transaction()
    change.add_set("a-new", SetSpec(SetKind.ADDR4, 4), "first")
    change.add_members("missing", SetKind.ADDR4, [bytes(4)], ("the", "second"))
    change.put_chain("c1-to", [DROP], "third")
    with pytest.raises(TransactionRefused) as refused:
        change.commit()
    assert refused.value.label == ("the", "second")
    assert refused.value.errno == errno.ENOENT
    assert "missing" in str(refused.value)
    assert table.read() == before
    change = table.transaction()
    change.add_set("a-new", SetSpec(SetKind.ADDR4, 4), "first")
    change.commit()
    assert "a-new" in table.read().sets


@pytest.mark.parametrize(
    ("label", "number"), [("full", errno.ENFILE), ("unknown chain", errno.ENOENT), ("in use", errno.EBUSY)]
)
def test_refusals(table: NftTable, label: str, number: int) -> None:
    write(table, fixed())
    change = table.transaction()
    if label == "full":
        change.add_set("a-small", SetSpec(SetKind.ADDR4, 4), "set")
        change.add_members("a-small", SetKind.ADDR4, [bytes([10, 0, 0, n]) for n in range(5)], label)
    elif label == "unknown chain":
        change.put_chain("c-9", [DROP, Rule((), Jump("nowhere"))], label)
    else:
        change.delete_chain("c1-from", label)
    with pytest.raises(TransactionRefused) as refused:
        change.commit()
    assert (refused.value.label, refused.value.errno) == (label, number)


def test_circle_of_jumps_is_refused(table: NftTable) -> None:
    change = table.transaction()
    change.put_chain("a-1", [], "a")
    change.put_chain("b-1", [Rule((), Jump("a-1"))], "b")
    change.put_chain("a-1", [Rule((), Jump("b-1"))], "again")
    change.put_class(GUARD.group_base + 1, "a-1", "b-1", "class")
    with pytest.raises(TransactionRefused):
        change.commit()
    assert table.read() == Actual(skeleton_ok=True)


def test_names_of_the_skeleton_are_refused(table: NftTable) -> None:
    change = table.transaction()
    with pytest.raises(ValueError, match="skeleton"):
        change.put_chain("guest-from", [], 1)
    with pytest.raises(ValueError, match="skeleton"):
        change.put_chain(GUEST_EGRESS, [], 1)
    with pytest.raises(ValueError, match="skeleton"):
        change.add_set("macs", SetSpec(SetKind.ADDR4, 4), 1)
    for name in ("all", "a b-c", "-x", "a-\n", "a-" + "b" * 120):
        with pytest.raises(ValueError, match="no name"):
            change.put_chain(name, [], 1)
    with pytest.raises(ValueError, match="kind net4"):
        change.add_members("x", SetKind.NET4, [parse_prefix("fd00::/8")], 1)
    with pytest.raises(ValueError, match="4-byte"):
        change.add_members("x", SetKind.ADDR4, [bytes(16)], 1)


# ---- sets -------------------------------------------------------------------------------------------------------


@ANY
@given(st.lists(st.sets(prefixes(4), max_size=30), min_size=2, max_size=5))
def test_net_set_moves_between_any_two_states(netns: Namespace, states: list[set]) -> None:
    table = NftTable(GUARD)
    table.load()
    change = table.transaction()
    change.add_set("a-nets", SetSpec(SetKind.NET4, 64), 0)
    change.commit()
    held: frozenset = frozenset()
    for state in states:
        wanted = disjoint(state)
        change = table.transaction()
        change.delete_members("a-nets", SetKind.NET4, held - wanted, "delete")
        change.add_members("a-nets", SetKind.NET4, wanted - held, "add")
        change.commit()
        assert table.read().members["a-nets"] == wanted
        held = wanted
    table.close()
    run("nft", "flush", "ruleset")


@pytest.mark.parametrize("kind", list(SetKind))
def test_hundred_thousand_members_in_one_transaction(table: NftTable, kind: SetKind) -> None:
    width = 4 if kind.value.endswith("4") else 16
    numbers = range(1 << 20, (1 << 20) + 800_000, 8)
    members = [n.to_bytes(width, "big") for n in numbers]
    if kind in (SetKind.NET4, SetKind.NET6):
        members = [parse_prefix("0.0.0.0/0")._replace(network=m, length=8 * width - 2) for m in members]
    change = table.transaction()
    change.add_set("a-big", SetSpec(kind, 131072), 0)
    change.add_members("a-big", kind, members, 1)
    change.commit()
    assert table.read().members["a-big"] == frozenset(members)
    change = table.transaction()
    change.delete_members("a-big", kind, members, 2)
    change.commit()
    assert table.read().members["a-big"] == frozenset()


def test_chain_is_replaced_in_place(table: NftTable) -> None:
    write(table, fixed())
    rules = [Rule((InSet(Side.SRC, "s-net4", SetKind.NET4),), Verdict.ACCEPT, "new"), DROP]
    change = table.transaction()
    change.put_chain("p-web-in", rules, 0)
    change.commit()
    assert table.read().chains["p-web-in"] == tuple(map(fingerprint, rules))


def test_class_changes_in_one_transaction(table: NftTable) -> None:
    write(table, fixed())
    group = GUARD.group_base + 1
    change = table.transaction()
    change.delete_class(group, 0)
    change.put_class(group, "c1-to", "p-web-in", 1)
    change.delete_chain("c1-from", 2)
    change.commit()
    assert table.read().classes == {group: ("c1-to", "p-web-in")}


@pytest.mark.parametrize("side", ["from", "to"])
def test_half_a_class_is_a_stray(table: NftTable, side: str) -> None:
    write(table, fixed())
    run("nft", "flush", "map", "inet", "slash32", f"class-{side}")
    _swept(table)
    assert table.read().classes == {}
    assert "jump c1" not in run("nft", "list", "map", "inet", "slash32", "class-from")


@pytest.mark.parametrize("family", ["inet", "arp"])
def test_half_an_exemption_is_a_stray(table: NftTable, family: str) -> None:
    table.load()
    run("nft", "add", "element", family, "slash32", "exempt", "{ lo }")
    _swept(table)
    assert "elements" not in run("nft", "list", "set", family, "slash32", "exempt")


def _swept(table: NftTable) -> None:
    strays = table.read().strays
    assert len(strays) == 1
    change = table.transaction()
    change.sweep(strays, 0)
    change.commit()
    assert not table.read().strays


# ---- owned ------------------------------------------------------------------------------------------------------

_CHILD = """
import sys
from hostd.dataplane.nft import NftTable
from nft_samples import GUARD, fixed, write
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
