# Owns: generated and hand-picked filters for the nf_tables tests, and how to bring one into a kernel.
from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hostd.compiler.ruleset import (
    GUEST_EGRESS,
    HOST_CHAINS,
    HOST_GUESTS,
    HOST_IN,
    Family,
    Goto,
    Guard,
    IcmpIs,
    InNets,
    InSet,
    Interface,
    Jump,
    Log,
    Match,
    Ports,
    Protocol,
    Rule,
    SetKind,
    SetSpec,
    Side,
    Verdict,
)
from hostd.dataplane.nft import Admission, Content, NftTable, disjoint
from slash32.net import Prefix, pack_mac, parse_address, parse_prefix
from slash32.policy import Icmp, PortRange

COUNT = 300 if os.environ.get("SLASH32_COUNTS") == "full" else 30
ANY = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
KINDS = {4: (SetKind.ADDR4, SetKind.NET4), 6: (SetKind.ADDR6, SetKind.NET6)}
SETS = {f"s-{kind.value}": SetSpec(kind, 64) for kind in SetKind}
_WAYS = st.booleans()
_HOST_CHAINS = st.sampled_from(HOST_CHAINS)
GUARD = Guard(prefixes=("vnet", "lxc-veth"), drop_transit=(4, 6), conn_limit=100)


@st.composite
def prefixes(draw: st.DrawFn, version: int) -> Prefix:
    bits = 32 if version == 4 else 128
    length = draw(st.integers(0, bits))
    number = draw(st.integers(0, 2**bits - 1)) >> (bits - length) << (bits - length)
    return Prefix(number.to_bytes(bits // 8, "big"), length)


def addresses(version: int) -> st.SearchStrategy[bytes]:
    size = 4 if version == 4 else 16
    return st.binary(min_size=size, max_size=size)


@st.composite
def port_ranges(draw: st.DrawFn) -> PortRange:
    first, last = sorted(draw(st.tuples(st.integers(1, 65535), st.integers(1, 65535))))  # a policy names no port 0
    return PortRange(first, draw(st.sampled_from((first, last))))


@st.composite
def _side(draw: st.DrawFn, version: int) -> list[Match]:
    side, found = draw(st.sampled_from(Side)), []
    if draw(st.booleans()):
        kind = draw(st.sampled_from(KINDS[version]))
        found.append(InSet(side, f"s-{kind.value}", kind, draw(st.booleans())))
    if draw(st.booleans()):
        nets = tuple(draw(st.lists(prefixes(version), min_size=1, max_size=4)))
        found.append(InNets(side, nets, draw(st.booleans())))
    return found


@st.composite
def rules(draw: st.DrawFn, chains: tuple[str, ...] = ()) -> Rule:
    version = draw(st.sampled_from((4, 6)))
    matches: list[Match] = [Family(version)] if draw(st.booleans()) else []
    what = draw(st.integers(0, 4))
    if what == 1:
        number = 1 if version == 4 else 58
        code = draw(st.none() | st.integers(0, 255))
        matches += [Protocol(number), IcmpIs(version, Icmp(draw(st.integers(0, 254)), code), draw(st.booleans()))]
    elif what == 2:
        matches.append(Protocol(draw(st.integers(1, 255)), True))
    elif what >= 3:
        matches.append(Protocol(draw(st.sampled_from((6, 17, 132)))))
        for side in draw(st.sets(st.sampled_from(Side))):
            ranges = tuple(draw(st.lists(port_ranges(), min_size=1, max_size=4)))
            matches.append(Ports(side, ranges, draw(st.booleans())))
    matches += draw(_side(version))
    if any(isinstance(m, InSet | InNets) and m.negate for m in matches) and Family(version) not in matches:
        matches.append(Family(version))  # as ruleset.py asks: whoever is of the other family is outside, too
    matches += [Interface(way, draw(st.sampled_from(("eth0", "en-p.1@x:y", "lo")))) for way in draw(st.sets(_WAYS))]
    verdict = draw(st.sampled_from([*Verdict, *map(Jump, chains), *map(Goto, chains), Log("i:web.2"), Log("e:A-z")]))
    return Rule(tuple(draw(st.permutations(matches))), verdict, draw(st.text(max_size=130)), draw(st.booleans()))


@st.composite
def contents(draw: st.DrawFn) -> Content:
    low = {f"p{n}-in": draw(st.lists(rules(), max_size=5)) for n in range(2)}
    high = {f"c{n}-from": draw(st.lists(rules(tuple(low)), max_size=3)) for n in range(2)}
    host = {n: draw(st.lists(rules(("p0-in",)), min_size=1, max_size=3)) for n in draw(st.sets(_HOST_CHAINS))}
    members = {}
    for name, spec in SETS.items():
        version = 4 if spec.kind in KINDS[4] else 6
        if spec.kind in (SetKind.ADDR4, SetKind.ADDR6):
            members[name] = frozenset(draw(st.sets(addresses(version), max_size=9)))
        else:
            members[name] = disjoint(draw(st.lists(prefixes(version), max_size=9)))
    base = GUARD.group_base
    classes = {base + n + 1: (f"c{n}-from", f"p{n}-in") for n in range(2)}
    return Content(SETS, members, {**low, **high, **host}, classes, draw(_admissions()))


@st.composite
def _admissions(draw: st.DrawFn) -> tuple[Admission, ...]:
    found = []
    for ifindex in draw(st.sets(st.integers(1000, 2**31 - 1), max_size=3)):
        mac = draw(st.binary(min_size=6, max_size=6))
        own = draw(st.sets(addresses(4) | addresses(6), min_size=1, max_size=3))
        behind = disjoint(draw(st.lists(prefixes(4) | prefixes(6), max_size=2)))
        found.append(Admission(ifindex, mac, tuple(sorted(own)), tuple(sorted(behind))))
    return tuple(found)


def fixed() -> Content:
    """Every kind of match, by hand."""
    src, dst = Side.SRC, Side.DST
    web = parse_prefix("10.0.0.0/24"), parse_prefix("10.0.1.0/25"), parse_prefix("10.0.9.1/32")
    dns = Ports(dst, (PortRange(53, 53), PortRange(5000, 5100)), True)
    low = [
        Rule((Family(4), Protocol(6), Ports(dst, (PortRange(80, 80),))), Verdict.ACCEPT, "policy web ingress 1"),
        Rule((Protocol(17), dns), Verdict.DROP, 'a "quoted" \n'),
        Rule((Protocol(6), Ports(src, (PortRange(0, 65535),)), Ports(dst, (PortRange(1, 2),), True)), Verdict.ACCEPT),
        Rule((Family(4), InSet(src, "s-addr4", SetKind.ADDR4)), Verdict.ACCEPT, "é"),
        Rule((Family(6), InSet(dst, "s-net6", SetKind.NET6, True)), Verdict.DROP),
        Rule((Family(4), InNets(src, web)), Verdict.ACCEPT),
        Rule((Family(4), InNets(dst, (parse_prefix("0.0.0.0/0"),))), Verdict.ACCEPT),
        Rule((Family(6), InNets(dst, (parse_prefix("fd00::/61"),), True)), Verdict.ACCEPT),
        Rule((Family(4), Protocol(1), IcmpIs(4, Icmp(8))), Verdict.ACCEPT),
        Rule((Protocol(1), IcmpIs(4, Icmp(3, 4), True)), Verdict.ACCEPT),
        Rule((Family(6), Protocol(58), IcmpIs(6, Icmp(128, 0))), Verdict.ACCEPT),
        Rule((Protocol(47, True),), Verdict.DROP),
        Rule((Interface(True, "eth0"), Interface(False, "br-lan.7"), Family(4)), Verdict.ACCEPT, counted=True),
        Rule((Family(4), InSet(src, "s-addr4", SetKind.ADDR4)), Log("i:web.3"), "policy web ingress 3"),
        Rule((Family(6),), Log("i:web.4"), counted=True),
        Rule((Protocol(6),), Verdict.CONTINUE, "staged", counted=True),
        Rule((), Verdict.CONTINUE),
        Rule((Protocol(7),), Verdict.RETURN, "Pass"),
        Rule((), Goto("p-tail")),
    ]
    admission = Admission(
        4711,
        pack_mac("52:54:00:00:00:02"),
        (parse_address("10.65.0.2"), parse_address("fd00:65::2")),
        (parse_prefix("10.66.0.0/26"), parse_prefix("fd00:66::/56")),
    )
    members = {"s-addr4": {parse_address("10.65.0.2")}, "s-net6": {parse_prefix("fd00::/8")}}
    chains = {
        "p-tail": [Rule((), Verdict.DROP, counted=True)],
        "p-web-in": low,
        "c1-from": [Rule((), Jump("p-web-in"), counted=True), Rule((), Verdict.DROP)],
        "c1-to": [],
        HOST_IN: [Rule((Interface(True, "eth0"),), Jump("p-web-in"))],
        HOST_GUESTS: [Rule((), Jump(GUEST_EGRESS))],
    }
    return Content(SETS, members, chains, {GUARD.group_base + 1: ("c1-from", "c1-to")}, (admission,))


def write(table: NftTable, content: Content) -> None:
    """All of it in one transaction, into tables that have none of it."""
    change = table.transaction()
    for name, spec in content.sets.items():
        change.add_set(name, spec, ("set", name))
        change.add_members(name, spec.kind, content.members.get(name, ()), ("members", name))
    for name, chain in content.chains.items():
        change.put_chain(name, chain, ("chain", name))
    for group, (from_chain, to_chain) in content.classes.items():
        change.put_class(group, from_chain, to_chain, ("class", group))
    for admission in content.admissions:
        change.admit(admission, ("endpoint", admission.ifindex))
    change.commit()
