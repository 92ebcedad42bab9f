# Owns: what is said when a kernel and the model differ: the smallest world in which they do, as YAML for
# `slash32 explain --offline`, the packet, and what each witness says of it.
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fabric import Fabric, shown
from verdict_packets import Case, Model, Shot
from verdict_worlds import HOST, UP0, UP1, Spot, spots

from hostd.compiler.ruleset import (
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    HOST_FROM_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
)
from hostd.dataplane.filter import NFTABLES
from hostd.dataplane.nft.listing import KernelFilter
from hostd.revocation.judge import View, Ways, judge
from slash32.documents import dump_yaml
from slash32.model import Endpoint
from slash32.net import Address, Prefix, format_address
from slash32.policy import Direction, Peer, Policy, Profile, Rule
from slash32.resources import API_VERSION, encode
from slash32.verdict import World

TRIES = 250


def report(fabric: Fabric, cases: Sequence[Case], wrong: Sequence[Shot], all_of_them: Iterable[Fabric]) -> str:
    """`cases`: what was there, one after the other; `wrong`: packets of the last on which this fabric differs."""
    last, shot = cases[-1], wrong[0]
    head = f"seed {last.seed}: {len(wrong)} packets differ in {fabric.kind}; first: {shown(shot)}"
    anew = Fabric(fabric.kind)
    try:
        if not anew.wrong(replace(last, shots=[shot])):
            before = "it differs only after what was there before: the change, or a world before, is to blame"
            return "\n".join((head, before, *_said(fabric, shot), as_yaml(last.world)))
        world = shrunk(last.world, lambda w: differs(anew, last.seed, w, shot))
        small = Case(last.seed, world, [Model(world).judged(shot)])
        lines = [head, "", *explain_line(small.shots[0]), ""]
        for each in all_of_them:
            other = anew if each is fabric else each
            other.wrong(small)
            lines += _said(other, small.shots[0])
        return "\n".join((*lines, "", as_yaml(world)))
    finally:
        anew.close()


def explain_line(shot: Shot) -> Iterator[str]:
    p = shot.packet
    what = f"{p.protocol}" if p.icmp is None else f"{p.protocol}/{p.icmp.type}/{p.icmp.code}"
    what += f"/{p.destination_port} --source-port {p.source_port}" if p.destination_port else ""
    ends = f"{format_address(p.source)} {format_address(p.destination)}"
    yield f"slash32 explain --offline -f world.yaml {ends} {what}"
    yield shown(shot)


def differs(fabric: Fabric, seed: int, world: World, shot: Shot) -> bool:
    ends = {Spot(shot.sender, shot.packet.source), Spot(shot.receiver, shot.packet.destination)}
    return ends <= {*spots(world)} and bool(fabric.wrong(Case(seed, world, [Model(world).judged(shot)])))


# -- witnesses --------------------------------------------------------------------------------------------------------


def _said(fabric: Fabric, shot: Shot) -> Iterator[str]:
    """The world is loaded."""
    with fabric.home.entered():
        model = Model(fabric.fleet_world)
        yield f"[{fabric.kind}] model: {model.judged(shot).word}: {model.says(shot)}"
        before = fabric.kernel.table.counters()
        yield f"[{fabric.kind}] kernel: {'arrived' if fabric.send([shot]) else 'dropped'}"
        for chain, counts in fabric.kernel.table.counters().items():
            old = before.get(chain, ())
            met = [n for n, count in enumerate(counts) if n >= len(old) or count != old[n]]
            if met:
                yield f"    rules of {chain} that counted it: {met}"
        desired = fabric.fleet.calc.desired
        views = {"abstract": View(desired.chains, lambda name, address: _holds(desired.members(name), address))}
        if fabric.kind == NFTABLES:
            listed = KernelFilter()
            chains = {c: rules for start in _asked(fabric, shot) for c, rules in listed.chains_from(start).items()}
            views["listed by nft"] = View(chains, listed.contains)
        ways = Ways(shot.packet.in_interface or "", shot.packet.out_interface or "")
        for name, view in views.items():
            for chain in _asked(fabric, shot):
                found = judge(view, chain, shot.packet, ways)
                why = found.rule.comment if found.rule else ""
                yield f"    {name}: {chain}: {found.accept} by rule {found.position} of {found.chain}: {why}"


def _asked(fabric: Fabric, shot: Shot) -> list[str]:
    taps = {tap.name: tap.chains for tap in fabric.fleet.calc.desired.taps.values()}
    found = []
    if shot.sender in taps:
        found.append(taps[shot.sender].egress)
    if shot.receiver in taps:
        found.append(taps[shot.receiver].ingress)
    forward = {(UP0, True): HOST_FORWARD_IN, (UP1, True): HOST_FORWARD_IN,
               (UP0, False): HOST_FORWARD_OUT, (UP1, False): HOST_FORWARD_OUT}  # fmt: skip
    if HOST not in (shot.sender, shot.receiver):
        return found + [forward[at] for at in ((shot.sender, True), (shot.receiver, False)) if at in forward]
    if shot.sender == HOST:
        return [*found, HOST_TO_GUESTS if shot.receiver in taps else HOST_OUT]
    return [*found, HOST_FROM_GUESTS if shot.sender in taps else HOST_IN]


def _holds(members: Iterable[Address | Prefix], address: Address) -> bool:
    return any(m.contains(address) if isinstance(m, Prefix) else m == address for m in members)


# -- smaller ----------------------------------------------------------------------------------------------------------


def shrunk(world: World, still: Callable[[World], bool]) -> World:
    """The smallest that is found by leaving out, and simplifying, one thing after the other."""
    left = TRIES
    again = True
    while again and left > 0:
        again = False
        for smaller in _smaller(world):
            left -= 1
            if left <= 0:
                break
            if still(smaller):
                world, again = smaller, True
                break
    return world


def _smaller(world: World) -> Iterator[World]:
    for name in ("policies", "profiles", "sets", "host_endpoints", "endpoints"):
        items = list(getattr(world, name))
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            if len(items) > 2:
                yield replace(world, **{name: half})
        for at in range(len(items)):
            yield replace(world, **{name: items[:at] + items[at + 1 :]})
    for tier in world.tiers:
        policies = [replace(p, tier="default") if p.tier == tier.name else p for p in world.policies]
        yield replace(world, tiers=[t for t in world.tiers if t != tier], policies=policies)
    for name, simpler in (("policies", _policies), ("profiles", _profiles), ("endpoints", _endpoints)):
        items = list(getattr(world, name))
        for at, item in enumerate(items):
            for other in simpler(item):
                yield replace(world, **{name: [*items[:at], other, *items[at + 1 :]]})


def _policies(policy: Policy) -> Iterator[Policy]:
    plain = {"selector": "all()", "order": None, "apply_on_forward": False, "keep_established": False}
    yield from _plainer(policy, plain)
    if len(policy.types) == 2:
        yield replace(policy, types=(Direction.INGRESS,), egress=())
        yield replace(policy, types=(Direction.EGRESS,), ingress=())
    yield from _profiles(policy)


def _profiles(item: Any) -> Iterator[Any]:
    if isinstance(item, Profile):
        yield from _plainer(item, {"labels": {}})
    for way in ("ingress", "egress"):
        rules = getattr(item, way)
        for at, rule in enumerate(rules):
            yield replace(item, **{way: rules[:at] + rules[at + 1 :]})
            for other in _rules(rule):
                yield replace(item, **{way: (*rules[:at], other, *rules[at + 1 :])})


def _rules(rule: Rule) -> Iterator[Rule]:
    plain, fields = Rule(rule.action), ("not_protocol", "ip_version", "icmp", "not_icmp", "source", "destination")
    yield from _plainer(rule, {name: getattr(plain, name) for name in fields})
    for side in ("source", "destination"):
        peer = getattr(rule, side)
        for other in _plainer(peer, {name: getattr(Peer(), name) for name in Peer.__slots__}):
            yield replace(rule, **{side: other})
        for name in ("nets", "not_nets", "ports", "not_ports"):
            some = getattr(peer, name)
            if len(some) > 1:
                yield from (replace(rule, **{side: replace(peer, **{name: (one,)})}) for one in some)


def _endpoints(endpoint: Endpoint) -> Iterator[Endpoint]:
    yield from _plainer(endpoint, {"labels": {}, "profiles": (), "prefixes": (), "shared": ()})
    for label in endpoint.labels if len(endpoint.labels) > 1 else ():
        yield replace(endpoint, labels={k: v for k, v in endpoint.labels.items() if k != label})


def _plainer(item: Any, plain: dict[str, Any]) -> Iterator[Any]:
    yield from (replace(item, **{name: value}) for name, value in plain.items() if getattr(item, name) != value)


# -- YAML -------------------------------------------------------------------------------------------------------------


def as_yaml(world: World) -> str:
    resources = [*world.tiers, *world.policies, *world.profiles, *world.sets, *world.host_endpoints]
    documents = [_endpoint(e, world.places.get(e.key, "")) for e in world.endpoints] + [encode(r) for r in resources]
    return "\n---\n".join(map(dump_yaml, documents)) + "\n"


def _endpoint(endpoint: Endpoint, host: str) -> dict[str, object]:
    spec: dict[str, object] = {"addresses": [format_address(a) for a in endpoint.addresses], "host": host}
    spec |= {"uuid": endpoint.key.uuid, "mac": endpoint.key.mac}
    if endpoint.profiles:
        spec["profiles"] = list(endpoint.profiles)
    if endpoint.prefixes:
        spec["prefixes"] = [str(p) for p in endpoint.prefixes]
    if endpoint.shared:
        spec["shared"] = [{"address": format_address(s.address), "group": s.group} for s in endpoint.shared]
    about = {"name": endpoint.domain, "labels": dict(endpoint.labels)}
    return {"apiVersion": API_VERSION, "kind": "Endpoint", "metadata": about, "spec": spec}
