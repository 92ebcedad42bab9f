# Owns: the judgement of tracked flows: allowed before a change, and after it? Pure.
from __future__ import annotations

from collections.abc import Callable, Collection

from slash32.net import Address, Prefix

from .desired import Actual, ClassChains, Member
from .judge import Judgement, View, judge, within
from .revoke import EGRESS, INGRESS, Change, Flow, InForce, Side
from .ruleset import Goto, Jump


class Trial:
    """Of the flows of taps from which a change took something. Made when it is in force."""

    def __init__(self, change: Change, force: InForce, actual: Actual) -> None:
        self._change, self._force, self._actual = change, force, actual
        self.kept: set[bytes] = set()
        self._after = View(force.chains, _asking(lambda name: force.members.get(name, ())))
        self._before = View({**force.chains, **change.chains}, _asking(self._members_before))
        self._owners = _Owners(actual)
        self._keeping: dict[str, bool] = {}

    def near(self) -> set[Member]:
        """Other flows than those from or to these need not be looked at."""
        if self._change.near is not None:
            return set(self._change.near)
        taps = [self._actual.taps[i] for i in {i for i, _ in self._change.sides} if i in self._actual.taps]
        return {owned for tap in taps for owned in tap.addresses | tap.prefixes}

    def condemned(self, flow: Flow) -> bool:
        """Some end's rules allowed it before and do not now, and no policy keeps it there."""
        packet = flow.packet
        sides = [(i, EGRESS) for i in self._owners.senders(packet.source)]
        sides += [(i, INGRESS) for i in self._owners.receivers(packet.destination)]
        kept = False
        for side in sides:
            if side in self._change.sides:
                lost = self._lost(flow, side)
                if lost is not None and not self._is_kept(flow, side, lost):
                    return True
                kept |= lost is not None
        if kept:
            self.kept.add(flow.name)
        return False

    def _lost(self, flow: Flow, side: Side) -> Judgement | None:
        """By what it was allowed before, if it was and is not now; an empty judgement where one cannot know."""
        ifindex, way = side
        chains = self._class(ifindex)
        if chains is None or judge(self._after, chains[way], flow.packet).accept:
            return None  # of no class: it is closed, whatever flows
        if not self._change.sides[side]:
            return Judgement(None)
        before = judge(self._before, self._change.classes[ifindex][way], flow.packet)
        return before if before.accept else None

    def _is_kept(self, flow: Flow, side: Side, before: Judgement) -> bool:
        """By the rule that allowed it, or its policy as it is now; where that is unknown, by any that applies now."""
        if before.accept:
            return before.keep or any(rule.keep for rule in self._force.chains.get(before.chain, ()))
        chains = self._class(side[0])
        return flow.name in self._force.kept or (chains is not None and self._keeps(chains[side[1]]))

    def _keeps(self, chain: str) -> bool:
        known = self._keeping.get(chain)
        if known is None:
            rules = self._force.chains.get(chain, ())
            targets = {rule.verdict.chain for rule in rules if isinstance(rule.verdict, Jump | Goto)}
            known = any(rule.keep for rule in rules) or any(map(self._keeps, sorted(targets)))
            self._keeping[chain] = known
        return known

    def _members_before(self, name: str) -> Collection[Member]:
        if name in self._change.whole:
            return self._change.whole[name]
        came, went = self._change.sets.get(name, ((), ()))
        now = self._force.members.get(name, set())
        return now.difference(came).union(went) if came or went else now

    def _class(self, ifindex: int) -> ClassChains | None:
        tap = self._actual.taps.get(ifindex)
        return self._actual.classes.get(tap.group) if tap is not None else None


def _asking(members: Callable[[str], Collection[Member]]) -> Callable[[str, Address], bool]:
    """Whether an address is in a set; each is looked up once."""
    tests: dict[str, Callable[[Address], bool]] = {}

    def contains(name: str, address: Address) -> bool:
        test = tests.get(name)
        if test is None:
            test = tests[name] = _test(members(name))
        return test(address)

    return contains


def _test(members: Collection[Member]) -> Callable[[Address], bool]:
    """Of a set that holds addresses only, or prefixes only."""
    if isinstance(next(iter(members), None), Prefix):
        return within(member for member in members if isinstance(member, Prefix))
    return frozenset(members).__contains__ if isinstance(members, list | tuple) else members.__contains__


class _Owners:
    """Which taps an address is behind. What comes to it goes where its route goes; what comes from it may come from any
    tap that has it, of a shared one."""

    def __init__(self, actual: Actual) -> None:
        self._routes = actual.routes
        self._single: dict[Address, list[int]] = {}
        self._behind: dict[tuple[int, int], dict[int, list[int]]] = {}  # (width, length) -> network -> taps
        for ifindex, tap in actual.taps.items():
            for address in tap.addresses:
                self._single.setdefault(address, []).append(ifindex)
            for network, length in tap.prefixes:
                width = len(network)
                networks = self._behind.setdefault((width, length), {})
                networks.setdefault(int.from_bytes(network, "big") >> 8 * width - length, []).append(ifindex)
        self._lengths = sorted(self._behind, key=lambda key: -key[1])

    def senders(self, address: Address) -> list[int]:
        return self._single.get(address) or self._those_before(address)

    def receivers(self, address: Address) -> list[int]:
        route = self._routes.get(Prefix(address, 8 * len(address)))
        return [route.oif] if route is not None else self.senders(address)

    def _those_before(self, address: Address) -> list[int]:
        number = int.from_bytes(address, "big")
        for width, length in self._lengths:
            if width == len(address):
                found = self._behind[width, length].get(number >> 8 * width - length)
                if found is not None:
                    return found
        return []
