# Owns: the judgement of tracked flows: allowed before a change, and after it? Pure.
from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from slash32.failsafe import TCP
from slash32.net import Address, Prefix
from slash32.verdict import Packet

from ..compiler.desired import Actual, ClassChains, Member
from ..compiler.forwarding import Way
from ..compiler.names import policy_of
from ..compiler.ruleset import GUEST_EGRESS, HOST_CHAINS, HOST_GUESTS, HOST_IN, HOST_OUT, Goto, Jump, Rule, Verdict
from .alike import Alike
from .ends import End, Ends
from .judge import Judgement, View, judge, within
from .revoke import HOST, Change, Flow, InForce, OwnSocket
from .revoke import Side as Place

_EVERYTHING: tuple[Member, ...] = (Prefix(bytes(4), 0), Prefix(bytes(16), 0))
_IN, _OUT = ((HOST, HOST_CHAINS.index(name)) for name in (HOST_IN, HOST_OUT))
_ASKED_BESIDES = {GUEST_EGRESS: (Rule((), Verdict.ACCEPT),)}  # the guest's class is an end of its own


class Surroundings(NamedTuple):
    way_to: Callable[[Address], Way]
    keeping: frozenset[str]  # chains of policies that keep what they allowed, and what their parts begin with
    dispatcher_port: int


class Trial:
    """Of the flows of taps from which a change took something. Made when it is in force."""

    def __init__(self, change: Change, force: InForce, actual: Actual, around: Surroundings) -> None:
        self._change, self._force, self._actual = change, force, actual
        self.kept: set[bytes] = set()
        self.sockets: set[OwnSocket] = set()  # the host's own of condemned flows, which would begin them anew
        after = {**force.chains, **_ASKED_BESIDES}
        self._now, self._then = _asking(lambda name: force.held(name) or ()), _asking(self._members_before)
        self._after = View(after, self._now)
        self._before = View({**after, **change.chains}, self._then)
        self._ends = Ends(actual, around.way_to, around.dispatcher_port)
        self._keeping = dict.fromkeys(around.keeping, True)
        self._known: dict[tuple[object, ...], Judgement | None] = {}
        self._alike: Alike | None = None  # made when the first flow is judged
        self._of_host = any(ifindex == HOST for ifindex, _ in change.sides)
        self._guests_may = bool(force.chains.get(HOST_GUESTS) or change.chains.get(HOST_GUESTS))

    def near(self) -> set[Member]:
        """Other flows than those from or to these need not be looked at."""
        if self._change.near is not None:
            return set(self._change.near)
        if self._of_host:
            return set(_EVERYTHING)
        taps = [self._actual.taps[i] for i in {i for i, _ in self._change.sides} if i in self._actual.taps]
        return {owned for tap in taps for owned in tap.addresses | tap.prefixes}

    def condemned(self, flow: Flow) -> bool:
        """Some end's rules allowed it before and do not now, and no policy keeps it there."""
        packet, kept = flow.packet, False
        ends = [End(side) for side in self._ends.of_guests(packet) if side in self._change.sides]
        if self._of_host:
            ends += [end for end in self._ends.of_host(packet) if end.side in self._change.sides]
        for end in ends:
            lost = self._lost_like(packet, end)
            if lost is None or self._never_asked(flow, end.side):
                continue
            if not self._is_kept(flow, end.side, lost):
                self._note_socket(packet, end.side)
                return True
            kept = True
        if kept:
            self.kept.add(flow.name)
        return False

    def _note_socket(self, packet: Packet, side: Place) -> None:
        ports = packet.source_port, packet.destination_port
        if packet.protocol != TCP or ports[0] is None or ports[1] is None:
            return
        begun = OwnSocket(packet.source, ports[0], packet.destination, ports[1])
        if side == _OUT:
            self.sockets.add(begun)
        elif side == _IN:
            self.sockets.add(OwnSocket(*begun[2:], *begun[:2]))

    def _never_asked(self, flow: Flow, side: Place) -> bool:
        return side[0] != HOST and self._ends.never_asked(flow.packet, side, self._guests_may)

    def _lost_like(self, packet: Packet, end: End) -> Judgement | None:
        """A guest may have very many flows, and rules tell few of them apart."""
        if self._alike is None:
            chains = *self._force.chains.values(), *self._change.chains.values()
            changed = self._change.sets.keys() | self._change.whole.keys()
            self._alike = Alike((rule for rules in chains for rule in rules), self._now, self._then, changed)
        like = end, self._alike.of(packet)
        try:
            return self._known[like]
        except KeyError:
            found = self._known[like] = self._lost(packet, end)
            return found

    def _lost(self, packet: Packet, end: End) -> Judgement | None:
        """By what it was allowed before, if it was and is not now; an empty judgement where one cannot know."""
        chain = self._chain(end.side)
        if chain is None:
            return None  # of no class: it is closed, whatever flows
        now = judge(self._after, chain, packet, end.ways).accept
        if now or (now is None and end.open):
            return None
        if not self._change.sides[end.side]:
            return Judgement(None)
        before = judge(self._before, self._chain_before(end.side), packet, end.ways)
        return before if before.accept or (before.accept is None and end.open) else None

    def _is_kept(self, flow: Flow, side: Place, before: Judgement) -> bool:
        """By the rule that allowed it, or its policy as it is now; where that is unknown, by any that applies now."""
        if self._change.sides[side]:
            rules = self._force.chains.get(before.chain, ())
            return before.keep or policy_of(before.chain) in self._keeping or any(rule.keep for rule in rules)
        chain = self._chain(side)
        return flow.name in self._force.kept or (chain is not None and self._keeps(chain))

    def _chain(self, side: Place) -> str | None:
        ifindex, way = side
        if ifindex == HOST:
            return HOST_CHAINS[way]
        chains = self._class(ifindex)
        return chains[way] if chains is not None else None

    def _chain_before(self, side: Place) -> str:
        ifindex, way = side
        return HOST_CHAINS[way] if ifindex == HOST else self._change.classes[ifindex][way]

    def _keeps(self, chain: str) -> bool:
        policy = policy_of(chain)
        known = self._keeping.get(policy)
        if known is None:
            rules = self._force.chains.get(chain, ())
            targets = {rule.verdict.chain for rule in rules if isinstance(rule.verdict, Jump | Goto)}
            known = any(rule.keep for rule in rules) or any(map(self._keeps, sorted(targets)))
            self._keeping[policy] = known
        return known

    def _members_before(self, name: str) -> Collection[Member]:
        if name in self._change.whole:
            return self._change.whole[name]
        came, went = self._change.sets.get(name, ((), ()))
        now = self._force.held(name) or set()
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
