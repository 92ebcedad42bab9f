# Owns: this dispatcher among the others of its store: what it tells them of its hosts, what it hears of theirs, and
# when it sends its hosts to them. Pure.
from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from slash32 import wire
from slash32.errors import quoted
from slash32.pack import WireError

from ..decisions.inputs import Command
from ..hosts.questions import SECONDS, Inquiry, Outcome
from ..store.commits import Failed, Peer, Table
from . import rolls
from .rolls import Adopt, Answer, Peers, Presence, Question, Roll

if TYPE_CHECKING:
    from ..core import Core
    from ..hosts.session import Session

log = logging.getLogger("slash32.dispatcher")

SOONEST, LATEST = 0.005, 1.0  # seconds between two rolls: when something changed, and when nothing did
ALARMS = 20  # of one host, in a roll
SHARE = 20  # of the time, one part goes into rolls at most
LOST = 0.6  # seconds without a store until hosts are sent to those who have it: by then these know whether they do
TOGETHER = 1.5  # seconds more, where others were without it, too: not all get it back at the same moment
AGAIN = 60.0  # seconds until a host that came back, since nobody else took it, is sent to one that has the store
FORWARDED = 0.8 * SECONDS  # seconds for hosts' answers to another dispatcher, which waits for those of all of them
INSISTS = 10.0  # seconds for which an operator's word about hosts elsewhere is said again
KNOWN = 0.2  # seconds until the others know our key


class Company:
    def __init__(self, core: Core) -> None:
        self.peers = Peers()
        self.moved = True  # something is to be told
        self.away = ""  # why hosts are sent to other dispatchers; empty: they are not
        self.out: list[tuple[str, bytes]] = []  # to whom (empty: to all), what
        self._core = core
        self._told, self._pause = 0.0, SOONEST
        self._joined: float | None = None
        self._sent: dict[str, float] = {}  # hosts that were sent away since the store was lost, and when
        self._puzzled = -AGAIN  # when a word that could not be used was last told of
        self._lost: float | None = None  # since when only we are without a store, as far as is known
        self._asked: dict[int, tuple[Inquiry, dict[str, int]]] = {}  # by our question's number: hosts' numbers
        self._adopting: dict[frozenset[str] | None, tuple[float, float]] = {}  # since when, and when to say it again
        self._seq = 0

    @property
    def others(self) -> list[str]:
        """The names of the other dispatchers of this store."""
        return [name for name in self._core.ledger.dispatchers if name != self._core.name]

    @property
    def removed(self) -> bool:
        """An operator did so while it runs: the others do not hear it."""
        return self._joined is not None and self._core.name not in self._core.ledger.dispatchers

    def join(self, address: str, public_key: str) -> None:
        """Makes this dispatcher known to the others, as soon as the store takes it."""
        self._core.turns.add(_Joining(self, Peer(address, public_key)))

    def known(self, mine: Peer) -> None:
        """To be decided."""
        ledger, name = self._core.ledger, self._core.name
        before = ledger.dispatchers.get(name)
        if before is not None and before != mine:
            log.warning("dispatcher %s: was %s before; two of one name?", name, before.address)
        ledger.who = f"dispatcher {name}"
        for other in [other for other, peer in ledger.dispatchers.items() if other != name and peer == mine]:
            log.info("dispatcher %s: was called %s before", name, other)
            ledger.write(Table.DISPATCHER, (other,), None)
        ledger.write(Table.DISPATCHER, (name,), mine)

    def joined(self) -> None:
        self._joined = self._core.clock()

    # -- what the others say --------------------------------------------------------------------------------------

    def hear(self, data: bytes, key: str, now: float) -> None:
        """`key`: that of its connection, which may be older than its dispatcher's end."""
        try:
            name, word = rolls.decode(data)
        except WireError as e:
            self._puzzle(str(e), now)
            return
        if name == self._core.name:
            self._puzzle(f"dispatcher {name}: another has this name, too: give each its own in dispatcher.toml", now)
            return
        known = self._core.ledger.dispatchers.get(name)
        if known is None or known.public_key != key:
            self._puzzle(f"dispatcher {quoted(name, 64)}: is none of this store: restart it if it should be", now)
            return
        match word:
            case Roll():
                self._roll(name, word, now)
            case Question(seq, hosts, question):
                self._question(name, seq, hosts, question)
            case Answer(seq, answers):
                self._answer(seq, answers)
            case Adopt(hosts):
                self._core.turns.add(Command(self._core, lambda core: core.adopt(hosts), f"dispatcher {name}"))

    def _puzzle(self, line: str, now: float) -> None:
        if now - self._puzzled >= AGAIN:
            self._puzzled = now
            log.warning("%s", line)

    def _roll(self, name: str, roll: Roll, now: float) -> None:
        core = self._core
        further = self.peers.take(name, roll, now)
        for host in core.connected.keys() & roll.hosts.keys():
            if roll.hosts[host].age <= now - core.connected[host].begun:
                core.drop(host, f"is connected to dispatcher {name} now")
        for host, settled, counts in further:
            core.commits.elsewhere(host, settled, now, counts)
        core.progress = True

    def _question(self, name: str, seq: int, hosts: Collection[str], question: str) -> None:
        here = [host for host in hosts if host in self._core.connected]
        inquiry = self._core.ask(here, question, FORWARDED)

        def tell(_: object) -> None:
            outcome: Outcome = inquiry.future.result(0)
            self.out.append((name, rolls.encode(self._core.name, Answer(seq, outcome.answers))))

        inquiry.future.add_done_callback(tell)

    def _answer(self, seq: int, answers: Mapping[str, str]) -> None:
        _, asked = self._asked.pop(seq, (None, {}))
        for host, number in asked.items():
            if host in answers:
                self._core.questions.answer(host, number, answers[host])
            else:
                self._core.questions.silent(number)

    # -- what we say ----------------------------------------------------------------------------------------------

    def ask(self, hosts: Collection[str], question: str, inquiry: Inquiry, now: float) -> list[str]:
        """Asks those of the hosts that are connected elsewhere. The others are returned."""
        elsewhere: dict[str, list[str]] = {}
        nowhere = []
        for host in hosts:
            found = self.peers.presence(host, now)
            if found is None:
                nowhere.append(host)
            else:
                elsewhere.setdefault(found[0], []).append(host)
        for seq in [seq for seq, (past, _) in self._asked.items() if past.future.done()]:
            del self._asked[seq]
        for name, asked in elsewhere.items():
            self._seq += 1
            self._asked[self._seq] = inquiry, {host: self._core.questions.ask(inquiry, host) for host in asked}
            self.out.append((name, rolls.encode(self._core.name, Question(self._seq, tuple(asked), question))))
        return nowhere

    def adopt(self, names: Collection[str] | None, now: float) -> list[str]:
        """Lets hosts that are connected elsewhere take our content; those that hold back there now."""
        found = self.peers.others(now)
        held = [host for host, (_, there) in found.items() if there.held and (names is None or host in names)]
        if held or names is None:
            self._adopting[None if names is None else frozenset(held)] = (now, now)
        return held

    def _adopt_again(self, now: float) -> None:
        """A word may be lost: it is said until it is seen to be done."""
        found = self.peers.others(now)
        for names, (begun, due) in list(self._adopting.items()):
            if now >= due:
                self.out.append(("", rolls.encode(self._core.name, Adopt(None if names is None else tuple(names)))))
                self._adopting[names] = begun, now + LATEST
            done = not any(there.held and (names is None or host in names) for host, (_, there) in found.items())
            if done or now - begun > INSISTS:
                del self._adopting[names]

    def tick(self, now: float) -> None:
        """To be called often: says what is due."""
        others = self.others
        if not others or self._joined is None or now - self._joined < KNOWN:
            return
        self.peers.forget(others)
        self._adopt_again(now)
        if now - self._told >= (self._pause if self.moved else LATEST):
            self._told, self.moved = now, False
            self.out.append(("", rolls.encode(self._core.name, self._own(now))))
            self._pause = max(SOONEST, SHARE * (self._core.clock() - now))

    @property
    def links(self) -> Mapping[str, Peer]:
        """Whom to be connected with."""
        joined = self._joined is not None and self._core.clock() - self._joined >= KNOWN
        return {name: self._core.ledger.dispatchers[name] for name in self.others} if joined else {}

    @property
    def deadline(self) -> float:
        """When `tick` is needed next."""
        if not self.others or self._joined is None:
            return float("inf")
        away = float("inf") if self._lost is None or self.away else self._lost + LOST
        return max(self._joined + KNOWN, min(away, self._told + (self._pause if self.moved else LATEST)))

    def presences(self, now: float, of: Collection[str] | None = None) -> dict[str, tuple[str, Presence]]:
        """Every host (None: of all) that is connected to some dispatcher, and to which."""
        core, others = self._core, self.peers.others(now)
        wanted = core.connected if of is None else [name for name in of if name in core.connected]
        here = {name: (core.name, self._presence(core.connected[name], now)) for name in wanted}
        return (others if of is None else {name: others[name] for name in of if name in others}) | here

    def failures(self, now: float) -> dict[str, tuple[tuple[str, str], ...]]:
        """What hosts could not put into their kernels, by host: object and message."""
        elsewhere = {host: there.failures for host, (_, there) in self.peers.others(now).items() if there.failures}
        here = {name: session.failures for name, session in self._core.connected.items()}
        own = {name: tuple((f.object, f.message) for f in found) for name, found in here.items()}
        return {name: found for name, found in (elsewhere | own).items() if found}

    def alarms(self, now: float) -> dict[str, tuple[tuple[str, str], ...]]:
        """Refused claims, by host."""
        elsewhere = {host: there.alarms for host, (_, there) in self.peers.others(now).items() if there.alarms}
        own = {host: tuple((str(key), why) for key, why in found.items()) for host, found in self._core.alarms.items()}
        return elsewhere | own

    def _own(self, now: float) -> Roll:
        core = self._core
        hosts = {name: self._presence(session, now) for name, session in core.connected.items()}
        return Roll(core.revision, not core.store.trouble, hosts)

    def _presence(self, session: Session, now: float) -> Presence:
        core, name = self._core, session.host
        publisher, about = core.fanout.publishers[name], session.hello.about
        return Presence(
            core.settled(session), core.commits.lag(name, now), publisher.held,
            about.get("version", ""), about.get("filter", ""),
            core.wall() - (now - session.heard), now - session.begun,
            tuple((f.object, f.message) for f in session.failures),
            tuple((str(key), why) for key, why in islice(core.alarms.get(name, {}).items(), ALARMS)),
        )  # fmt: skip

    def look(self, now: float) -> None:
        """To be called often, and before what is to be sent is sent: sends hosts away where that is better for them.

        Where it was removed, nobody would know of them. Without a store, hosts are better off with a dispatcher that
        has it; or with any other, where we hear nobody: then it is us who are cut off. Where nobody has it, they stay.
        """
        if self.removed:
            self._send_away("this one was removed by an operator", now)
            return
        if not self._core.store.trouble or not self.others:
            self.moved = self.moved or self._lost is not None
            self._lost, self.away = None, ""
            self._sent.clear()
            return
        if self._lost is None:
            self._lost, self.moved = now, True
        fresh = [roll.healthy for _, roll in self.peers.fresh(now)]
        if fresh and not any(fresh):
            self._lost, self.away = now + TOGETHER, ""
        if now - self._lost < LOST:
            return
        self._send_away("this one has lost its store", now)

    def _send_away(self, why: str, now: float) -> None:
        away = wire.AWAY + why
        if away != self.away:
            log.warning("hosts are sent to other dispatchers: %s", why)
            self.away = away
        for host in list(self._core.connected):
            if self.sends_away(host, now):
                self._core.drop(host, f"is sent to another dispatcher: {why}", away)

    def sends_away(self, host: str, now: float) -> bool:
        """A host that comes back has found nobody else: it stays, until it is worth another attempt."""
        if not self.away:
            return False
        sent = self._sent.get(host)
        healthy = any(roll.healthy for _, roll in self.peers.fresh(now))
        if sent is None or (healthy and now - sent >= AGAIN):
            self._sent[host] = now
            return True
        return False


class _Joining:
    """See inputs.Said: whatever happens to the store, it stays wanted."""

    patient = True

    def __init__(self, company: Company, peer: Peer) -> None:
        self._company, self._peer = company, peer

    def decide(self) -> None:
        self._company.known(self._peer)

    def landed(self) -> None:
        self._company.joined()

    def failed(self, why: Failed) -> None:
        raise AssertionError("it is patient")
