# Writing, reading back, refusing, healing, leaving others alone: iptables-legacy and ipset as one packet filter,
# against the real kernel.
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from netns import Namespace, run
from nft_samples import GUARD, contents

from hostd.compiler.ruleset import (
    HOST_CHAINS,
    Goto,
    Guard,
    InNets,
    InSet,
    Jump,
    Ports,
    Protocol,
    Rule,
    SetKind,
    SetSpec,
    Side,
    Verdict,
)
from hostd.dataplane.iptables.names import is_outward
from hostd.dataplane.iptables.render import render
from hostd.dataplane.iptables.table import IptablesFilter
from hostd.dataplane.nft import Admission, Content, TransactionRefused
from slash32.net import Prefix, parse_address, parse_prefix
from slash32.policy import PortRange

COUNT = 200 if os.environ.get("SLASH32_COUNTS") == "full" else 25
ANY = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
ACCEPT, DROP = Rule((), Verdict.ACCEPT), Rule((), Verdict.DROP)
MAC = bytes.fromhex("525400000001")
BASE = Guard().group_base
A, B = parse_address("10.0.0.1"), parse_address("10.0.0.2")
ADDR = SetSpec(SetKind.ADDR4, 256)
_NAMES = {"p0-in": "pi-p0", "p1-in": "pi-p1", "c0-from": "from-c0", "c1-from": "from-c1"}


@pytest.fixture
def table(netns: Namespace) -> Iterator[IptablesFilter]:
    made = IptablesFilter(Guard())
    made.load()
    yield made
    made.close()


def tap(name: str) -> int:
    run("ip", "link", "add", name, "type", "veth", "peer", "name", f"far-{name}")
    return int(run("ip", "-o", "link", "show", name).split(":")[0])


def renamed(content: Content) -> Content:
    """By names that say which way a chain is asked; no chain asks one of the other way."""

    def rule(old: Rule, chain: str) -> Rule:
        to = old.verdict
        if not isinstance(to, Jump | Goto):
            return old
        return old._replace(verdict=Verdict.DROP if is_outward(chain) else type(to)(_NAMES[to.chain]))

    chains = {n: [rule(r, n) for r in rules] for old, rules in content.chains.items() for n in [_NAMES.get(old, old)]}
    classes = {group: (_NAMES[a], _NAMES[b]) for group, (a, b) in content.classes.items()}
    members = {name: [m for m in some if m not in (bytes(4), bytes(16))] for name, some in content.members.items()}
    return Content(content.sets, members, chains, classes, ())  # type: ignore[arg-type]


def write(table: IptablesFilter, content: Content) -> None:
    change = table.transaction()
    for name, spec in content.sets.items():
        change.add_set(name, spec, name)
        change.add_members(name, spec.kind, content.members.get(name, ()), name)
    for name, rules in content.chains.items():
        change.put_chain(name, rules, name)
    for group, chains in content.classes.items():
        change.put_class(group, *chains, group)
    change.commit()


@ANY
@given(contents())
def test_what_is_written_is_read_and_loads_again(content: Content) -> None:
    content = renamed(content)
    namespace = Namespace()
    with namespace.entered():
        made = IptablesFilter(GUARD)
        made.load()
        write(made, content)
        found = IptablesFilter(GUARD).read()
        for name, rules in content.chains.items():
            assert found.chains.get(name, ()) == made.fingerprints(rules)
        assert found.chains.keys() <= content.chains.keys()
        assert found.sets == content.sets and found.classes == content.classes
        assert found.members == {n: frozenset(content.members.get(n, ())) for n in content.sets}
        assert found.skeleton_ok and not found.strays and not made.changed()
        for command in ("iptables-legacy", "ip6tables-legacy"):
            run(f"{command}-restore", "--test", stdin=run(f"{command}-save"))
        made.remove()
        made.close()
        assert not run("ipset", "list", "-name") and "s32" not in run("iptables-legacy-save")
    namespace.close()


def test_a_second_load_writes_nothing(table: IptablesFilter) -> None:
    assert not table.load() and table.stands() and not table.changed()


def test_others_rules_stay_and_stand_behind_ours(table: IptablesFilter) -> None:
    run("iptables-legacy", "-t", "mangle", "-I", "FORWARD", "-p", "tcp", "-j", "ACCEPT")
    run("iptables-legacy", "-t", "mangle", "-N", "theirs")
    assert table.changed()
    assert table.load() and not table.changed()
    rules = [x for x in run("iptables-legacy", "-t", "mangle", "-S", "FORWARD").splitlines() if x.startswith("-A")]
    assert "s32-forward" in rules[0] and "-p tcp" in rules[1] and len(rules) == 2
    change = table.transaction()
    change.put_chain("po-a", [ACCEPT], 0)
    change.commit()
    assert table.read().chains == {"po-a": table.fingerprints([ACCEPT])}
    table.remove()
    left = run("iptables-legacy", "-t", "mangle", "-S").splitlines()
    assert left[-2:] == ["-N theirs", "-A FORWARD -p tcp -j ACCEPT"]


HARMS = {
    "raw flushed": ("iptables-legacy", "-t", "raw", "-F"),
    "security flushed": ("ip6tables-legacy", "-t", "security", "-F"),
    "mangle flushed": ("iptables-legacy", "-t", "mangle", "-F"),
    "our jump taken away": ("iptables-legacy", "-t", "security", "-D", "FORWARD", "1"),
    "a rule put before ours": ("iptables-legacy", "-t", "raw", "-I", "s32-source", "-j", "ACCEPT"),
    "a rule of the policy taken away": ("iptables-legacy", "-t", "security", "-D", "po-a", "1"),
    "a rule replaced": ("ip6tables-legacy", "-t", "mangle", "-A", "po-a", "-j", "ACCEPT"),
    "a class taken away": ("iptables-legacy", "-t", "security", "-F", "s32-cf-10"),
    "a member taken away": ("ipset", "del", "s32a4-x", "10.0.0.1"),
    "a member added": ("ipset", "add", "s32a4-x", "10.0.0.9"),
    "sets emptied": ("ipset", "flush"),
    "a tap's address taken away": ("ipset", "del", "s32-source4", "10.0.0.1,vnet0"),
}


def settled(table: IptablesFilter) -> Admission:
    admission = Admission(tap("vnet0"), MAC, (A,), ())
    change = table.transaction()
    change.add_set("addr4-x", ADDR, 0)
    change.add_members("addr4-x", SetKind.ADDR4, [A], 0)
    change.put_chain("po-a", [Rule((InSet(Side.DST, "addr4-x", SetKind.ADDR4),), Verdict.ACCEPT)], 0)
    change.put_chain("from-1", [Rule((), Jump("po-a")), DROP], 0)
    change.put_chain("to-1", [DROP], 0)
    change.put_class(BASE + 1, "from-1", "to-1", 0)
    change.admit(admission, 0)
    change.commit()
    return admission


@pytest.mark.parametrize("harm", HARMS)
def test_what_others_do_is_seen(table: IptablesFilter, harm: str) -> None:
    settled(table)
    before = table.read()
    assert not table.changed() and before.skeleton_ok
    run(*HARMS[harm])
    assert table.changed()
    table.load()
    after = table.read()
    assert after.skeleton_ok and not table.changed()
    guard_only = harm in ("raw flushed", "our jump taken away", "a rule put before ours")
    assert (after == before) == guard_only, "and what load() does not heal shows in read()"


def test_an_admission_is_for_one_interface_only(table: IptablesFilter) -> None:
    admission = settled(table)
    assert table.read().admissions == {(admission.ifindex, MAC, A)}
    run("ip", "link", "del", "vnet0")
    again = tap("vnet0")
    late = table.read()
    assert again != admission.ifindex and not late.admissions and len(late.strays) == 1
    change = table.transaction()
    change.admit(Admission(again, MAC, (B,)), 0)
    change.commit()
    assert table.read().admissions == {(again, MAC, B)} and not table.read().strays, "the older one's address is gone"
    change = table.transaction()
    change.expel(admission, 0)
    change.commit()
    assert table.read().admissions == {(again, MAC, B)}, "the older one's end takes nothing from it"
    change = table.transaction()
    change.expel(Admission(again, MAC, (B,)), 0)
    change.commit()
    assert not table.read().admissions and not run("ipset", "list", "s32-source4").split("Members:\n")[1]


def test_strays_are_swept(table: IptablesFilter) -> None:
    settled(table)
    run("ipset", "add", "s32-source4", "10.0.0.66,vnet9")
    run("iptables-legacy", "-t", "security", "-F", "s32-ct-10")
    found = table.read()
    assert len(found.strays) == 2 and not found.classes
    change = table.transaction()
    change.sweep(found.strays, 0)
    change.commit()
    after = table.read()
    assert not after.strays and not after.classes and len(after.admissions) == 1


def test_exempt_interfaces(table: IptablesFilter) -> None:
    index, other = tap("vnet5"), tap("vnet6")
    for number, (which, on) in enumerate(((index, True), (other, True), (index, False))):
        change = table.transaction()
        change.exempt(which, on, number)
        change.commit()
    assert table.read().exempt == {other}
    run("ip", "link", "del", "vnet6")
    assert table.read().exempt == frozenset() and table.read().strays


# -- refusals -------------------------------------------------------------------------------------------------------


def refusal(table: IptablesFilter, *wrong: tuple[str, object]) -> TransactionRefused:
    change = table.transaction()
    change.put_chain("po-fine", [ACCEPT], "fine")
    for name, rules in wrong:
        change.put_chain(name, rules, name)  # type: ignore[arg-type]
    with pytest.raises(TransactionRefused) as refused:
        change.commit()
    return refused.value


def test_a_refusal_names_the_operation(table: IptablesFilter) -> None:
    nowhere = refusal(table, ("po-bad", [Rule((), Jump("po-nowhere"))]))
    assert nowhere.label == "po-bad" and "po-nowhere" in nowhere.message
    unknown = refusal(table, ("po-bad", [Rule((InSet(Side.SRC, "addr4-none", SetKind.ADDR4),), Verdict.DROP)]))
    assert unknown.label == "po-bad" and "\n" not in unknown.message
    change = table.transaction()
    change.add_set("addr4-small", SetSpec(SetKind.ADDR4, 2), "set")
    change.add_members("addr4-small", SetKind.ADDR4, [bytes([10, 0, 0, n]) for n in range(200)], "members")
    with pytest.raises(TransactionRefused) as full:
        change.commit()
    assert full.value.label == "members" and "full" in full.value.message
    settled(table)
    for wanted, delete in (("po-a", "delete_chain"), ("addr4-x", "delete_set")):
        change = table.transaction()
        getattr(change, delete)(wanted, wanted)
        with pytest.raises(TransactionRefused) as used:
            change.commit()
        assert used.value.label == wanted
    change = table.transaction()
    change.put_chain("po-fine", [ACCEPT], 0)
    change.commit()
    assert "po-fine" in table.read().chains


def test_a_class_of_chains_the_wrong_way_round_is_refused(table: IptablesFilter) -> None:
    settled(table)
    change = table.transaction()
    with pytest.raises(TransactionRefused):
        change.put_class(BASE + 2, "to-1", "from-1", 0)


# -- what iptables cannot say in one rule -----------------------------------------------------------------------------


def test_many_ports_and_prefixes(table: IptablesFilter) -> None:
    many = tuple(PortRange(n, n + n % 3) for n in range(1, 400, 5))
    nets = tuple(Prefix(bytes([10, n, 0, 0]), 16) for n in range(0, 50, 2))
    rules = [
        Rule((Protocol(6), Ports(Side.DST, many, negate), InNets(Side.SRC, nets, negate)), Verdict.ACCEPT)
        for negate in (False, True)
    ]
    change = table.transaction()
    change.put_chain("po-many", rules, 0)
    change.commit()
    assert table.read().chains["po-many"] == table.fingerprints(rules)
    constant = [x for x in run("ipset", "list", "-name").split() if x.startswith("s32+")]
    assert len(constant) == 1
    change = table.transaction()
    change.put_chain("po-many", [ACCEPT], 0)
    change.commit()
    assert "s32+" not in run("ipset", "list", "-name"), "collected with its last user"


def test_the_whole_of_an_address_family_is_a_member(table: IptablesFilter) -> None:
    change = table.transaction()
    change.add_set("net4-all", SetSpec(SetKind.NET4, 256), 0)
    change.add_members("net4-all", SetKind.NET4, [parse_prefix("0.0.0.0/0")], 0)
    change.commit()
    assert table.read().members["net4-all"] == {parse_prefix("0.0.0.0/0")}
    change = table.transaction()
    change.flush_set("net4-all", 0)
    change.add_members("net4-all", SetKind.NET4, [parse_prefix("10.0.0.0/8")], 0)
    change.commit()
    assert table.read().members["net4-all"] == {parse_prefix("10.0.0.0/8")}


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize(("version", "half", "whole"), [(4, "128.0.0.0/1", "0.0.0.0/0"), (6, "::/1", "::/0")])
def test_from_half_of_an_address_family_to_all_of_it(
    table: IptablesFilter, version: int, half: str, whole: str, way: str
) -> None:
    """To ipset the whole is two halves: what comes is not taken away with what goes."""
    kind = SetKind.NET4 if version == 4 else SetKind.NET6
    first, then = (half, whole) if way == "there" else (whole, half)
    for order in ((True, False), (False, True)):
        name = f"net{version}-{order[0]}"
        change = table.transaction()
        change.add_set(name, SetSpec(kind, 256), 0)
        change.add_members(name, kind, [parse_prefix(first)], 0)
        change.commit()
        change = table.transaction()
        for add in order:
            if add:
                change.add_members(name, kind, [parse_prefix(then)], 0)
            else:
                change.delete_members(name, kind, [parse_prefix(first)], 0)
        change.commit()
        assert table.read().members[name] == {parse_prefix(then)}


@pytest.mark.parametrize("left", [("10.66.12.0/26", "10.66.12.64/26"), ("10.66.12.0/25", "10.66.12.64/26")])
def test_what_was_not_taken_out_any_more_is_read_as_it_is(table: IptablesFilter, left: tuple[str, str]) -> None:
    """hostd was killed between what came and what went. Together they are another prefix, which is no member."""
    change = table.transaction()
    change.add_set("net4-two", SetSpec(SetKind.NET4, 256), 0)
    change.add_members("net4-two", SetKind.NET4, map(parse_prefix, left), 0)
    change.commit()
    found = table.read().members["net4-two"]
    assert found == set(map(parse_prefix, left))
    change = table.transaction()
    change.delete_members("net4-two", SetKind.NET4, [m for m in found if m != parse_prefix(left[1])], 0)
    change.commit()
    assert table.read().members["net4-two"] == {parse_prefix(left[1])}


def test_a_hundred_thousand_members(table: IptablesFilter) -> None:
    members = {(0x0A000000 + 3 * n).to_bytes(4, "big") for n in range(100_000)}
    for name, kind, some in (
        ("addr4-big", SetKind.ADDR4, members),
        ("addr6-big", SetKind.ADDR6, {bytes(12) + m for m in members}),
    ):
        change = table.transaction()
        change.add_set(name, SetSpec(kind, 1 << 18), 0)
        change.add_members(name, kind, some, 0)
        change.commit()
        assert table.read().members[name] == some


def test_chains_of_host_endpoints_are_emptied_not_deleted(table: IptablesFilter) -> None:
    for name in HOST_CHAINS:
        change = table.transaction()
        change.put_chain(name, [ACCEPT], 0)
        change.commit()
        assert table.read().chains == {name: table.fingerprints([ACCEPT])}
        change = table.transaction()
        change.delete_chain(name, 0)
        change.commit()
        assert not table.read().chains and table.stands()


def test_counters_are_the_rules(table: IptablesFilter) -> None:
    either = Rule((), Verdict.CONTINUE, counted=True)
    only4 = Rule((InSet(Side.SRC, "addr4-x", SetKind.ADDR4),), Verdict.DROP)
    settled(table)
    change = table.transaction()
    change.put_chain("po-a", [either, only4, ACCEPT], 0)
    change.commit()
    assert table.counters({"po-a"}) == {"po-a": ((0, 0),) * 3}


# -- as text ----------------------------------------------------------------------------------------------------------


@settings(max_examples=max(4, COUNT // 5), deadline=None, suppress_health_check=list(HealthCheck))
@given(contents())
def test_the_text_loads_as_what_is_written(content: Content) -> None:
    content = renamed(content)
    namespace = Namespace()
    with namespace.entered():
        index = tap("vnet0")
        behind = (parse_prefix("10.1.0.0/24"), parse_prefix("fd00:1::/64"))
        content = replace(content, admissions=[Admission(index, MAC, (A, bytes(15) + b"\1"), behind)])
        sets, v4, v6 = re.split(r"# .*restore.*\n", render(GUARD, content, {index: "vnet0"}))[1:]
        run("ipset", "restore", stdin=sets)
        run("iptables-legacy-restore", "--noflush", stdin=v4)
        run("ip6tables-legacy-restore", "--noflush", stdin=v6)
        table = IptablesFilter(GUARD)
        assert not table.load(), "hostd finds its guard in it"
        found = table.read()
        assert not found.strays and found.classes == content.classes and found.sets == content.sets
        assert found.admissions == set(next(iter(content.admissions)).grants())
        for name, rules in content.chains.items():
            assert found.chains.get(name, ()) == table.fingerprints(rules)
        table.close()
    namespace.close()
