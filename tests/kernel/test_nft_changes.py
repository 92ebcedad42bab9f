# What transactions do to the table, against the real kernel: endpoints come and go, sets move between any two states,
# what is refused changes nothing.
from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netns import Namespace, run
from nft_samples import ANY, GUARD, fixed, prefixes, write

from hostd.compiler.ruleset import GUEST_EGRESS, InSet, Jump, Rule, SetKind, SetSpec, Side, Verdict
from hostd.dataplane.nft import Actual, Admission, NftTable, TransactionRefused, disjoint, fingerprint
from slash32.net import parse_address, parse_prefix

DROP = Rule((), Verdict.DROP)
MAC = bytes.fromhex("525400000001")
ALICE = Admission(7, MAC, (parse_address("10.0.0.1"), parse_address("fd00::1")), (parse_prefix("10.1.0.0/24"),))

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
