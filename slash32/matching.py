# Owns: a world and a packet in it as data, who has an address, which labels it has, and whether a rule matches. Pure.
# Half of the specification of policy; the other half, who is asked and whose word counts, is slash32.verdict.
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from slash32 import selector as selectors
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address, Prefix, version
from slash32.policy import HostEndpoint, Icmp, NetworkSet, Peer, Policy, PortRange, Profile, Rule, Tier

_ICMP_VERSION = {1: 4, 58: 6}


@dataclass(frozen=True, slots=True)
class World:
    endpoints: Sequence[Endpoint]
    policies: Sequence[Policy] = ()  # staged ones, too: they never decide
    profiles: Sequence[Profile] = ()
    tiers: Sequence[Tier] = ()  # besides `default`
    sets: Sequence[NetworkSet] = ()
    host_endpoints: Sequence[HostEndpoint] = ()
    places: Mapping[EndpointKey, str] = field(default_factory=dict)  # host of each endpoint, as far as known


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a flow. Ports of protocols that have them; `icmp` with its code, of ICMP or ICMPv6. Names of
    interfaces where they are known: by which it leaves the source's host, and comes into the destination's."""

    source: Address
    destination: Address
    protocol: int
    source_port: int | None = None
    destination_port: int | None = None
    icmp: Icmp | None = None
    out_interface: str | None = None
    in_interface: str | None = None


def effective_labels(endpoint: Endpoint | HostEndpoint, profiles: Mapping[str, Profile]) -> dict[str, str]:
    """The endpoint's labels, with those its profiles apply below them; of two profiles the first named wins."""
    labels: dict[str, str] = {}
    for name in reversed(endpoint.profiles):
        if name in profiles:
            labels.update(profiles[name].labels)
    return labels | dict(endpoint.labels)


def owners(endpoints: Iterable[Endpoint], address: Address) -> list[Endpoint]:
    """Every endpoint that has the address: as its own, shared, or in a prefix behind it."""
    return [e for e in endpoints if address in e.all_addresses() or any(p.contains(address) for p in e.prefixes)]


class Whereabouts:
    """Who has which address in a world, and with which labels; for many questions."""

    def __init__(self, world: World) -> None:
        self.profiles = {profile.name: profile for profile in world.profiles}
        self._guests: dict[Address, list[Endpoint]] = {}
        self._behind: list[tuple[Prefix, Endpoint]] = []
        self._hosts: dict[Address, list[HostEndpoint]] = {}
        self._nets = [(net, dict(each.labels)) for each in world.sets for net in each.nets]
        self._labels: dict[Address, list[dict[str, str]]] = {}
        for endpoint in world.endpoints:
            for address in dict.fromkeys(endpoint.all_addresses()):
                self._guests.setdefault(address, []).append(endpoint)
            self._behind += [(prefix, endpoint) for prefix in endpoint.prefixes]
        for host in world.host_endpoints:
            for address in dict.fromkeys(host.addresses):
                self._hosts.setdefault(address, []).append(host)

    def claimants(self, address: Address) -> list[Endpoint]:
        """The owners with the most specific claim: an address beats a prefix, a longer prefix a shorter one."""
        if address in self._guests:
            return self._guests[address]
        behind = [(prefix.length, endpoint) for prefix, endpoint in self._behind if prefix.contains(address)]
        longest = max((length for length, _ in behind), default=0)
        return [endpoint for length, endpoint in behind if length == longest]

    def hosts(self, address: Address) -> list[str]:
        """Names of the hosts whose own address it is."""
        return list(dict.fromkeys(host.node for host in self._hosts.get(address, ())))

    def labels(self, address: Address) -> list[dict[str, str]]:
        """Of each that a selector may find by this address: owners, network sets, host endpoints. Nobody's address has
        no labels at all: not even all() selects it."""
        if address not in self._labels:
            guests = [*self._guests.get(address, ()), *(e for p, e in self._behind if p.contains(address))]
            found = [effective_labels(each, self.profiles) for each in (*guests, *self._hosts.get(address, ()))]
            self._labels[address] = found + [labels for net, labels in self._nets if net.contains(address)]
        return self._labels[address]


def rule_matches(rule: Rule, packet: Packet, who: Whereabouts) -> bool:
    """A rule about ICMP is about IPv4, one about ICMPv6 about IPv6, whether or not it says so."""
    return (
        rule.ip_version in (None, version(packet.source))
        and _ICMP_VERSION.get(rule.protocol or 0) in (None, version(packet.source))
        and rule.protocol in (None, packet.protocol)
        and (rule.not_protocol is None or rule.not_protocol != packet.protocol)
        and _icmp_fields_hold(rule, packet)
        and _peer_matches(rule.source, packet.source, packet.source_port, who)
        and _peer_matches(rule.destination, packet.destination, packet.destination_port, who)
    )


def _icmp_fields_hold(rule: Rule, packet: Packet) -> bool:
    if rule.icmp is None and rule.not_icmp is None:
        return True
    if packet.icmp is None or _ICMP_VERSION.get(packet.protocol) != version(packet.source):
        return False  # nothing to read them from
    wanted = rule.icmp is None or _icmp_matches(rule.icmp, packet.icmp)
    return wanted and (rule.not_icmp is None or not _icmp_matches(rule.not_icmp, packet.icmp))


def _icmp_matches(asked: Icmp, have: Icmp) -> bool:
    return asked.type == have.type and asked.code in (None, have.code)


def _peer_matches(peer: Peer, address: Address, port: int | None, who: Whereabouts) -> bool:
    return (
        (not peer.nets or any(net.contains(address) for net in peer.nets))
        and not any(net.contains(address) for net in peer.not_nets)
        and (peer.selector is None or _selects(peer.selector, address, who))
        and (peer.not_selector is None or not _selects(peer.not_selector, address, who))
        and (not peer.ports or _among(peer.ports, port))
        and (not peer.not_ports or (port is not None and not _among(peer.not_ports, port)))
    )


def _selects(selector: str, address: Address, who: Whereabouts) -> bool:
    chosen = parsed(selector)
    return any(chosen.matches(labels) for labels in who.labels(address))


def _among(ranges: tuple[PortRange, ...], port: int | None) -> bool:
    return port is not None and any(first <= port <= last for first, last in ranges)


@lru_cache(maxsize=4096)
def parsed(text: str) -> selectors.Selector:
    return selectors.parse(text)
