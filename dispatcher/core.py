# Owns: the dispatcher without its sockets: what each message of a host and each word of an operator means. One thread.
# Inputs are taken one by one; `flush` has those that change something committed together, durably, and only then says
# what is to be sent.
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from slash32 import wire
from slash32.errors import quoted
from slash32.journal import fields
from slash32.model import Endpoint, EndpointKey
from slash32.pack import pack_endpoint
from slash32.sync import NO_SESSION
from slash32.wire import Ack, Answer, Claim, Expect, Failure, Hello, Ping, Release, Report, WireError

from .decisions.claims import Claims
from .decisions.hellos import Hellos
from .decisions.inputs import Asking, Command, Said
from .decisions.ledger import DISPATCHER, Ledger
from .decisions.turns import Turns
from .hosts.fanout import Fanout, Frames
from .hosts.live import Commits
from .hosts.questions import SECONDS, Inquiry, Questions
from .hosts.session import Left, Session
from .metrics import Counts
from .replicas.company import Company
from .store.commits import ANY, Commit, Holding, Store, Table

log = logging.getLogger("slash32.dispatcher")

SILENCE = 12.0  # seconds without a word from a host: not connected; it pings every five
MAX_ASKED = 2 * wire.MAX_FRAME  # bytes of what one host asked that wait to be decided, or to be answered
MAX_WORDS = 100  # lines about one host between two sweeps
Out = tuple[bytes, Frames]  # routing id, frames


class Core:
    def __init__(self, store: Store, clock: Callable[[], float], wall: Callable[[], float], name: str = "") -> None:
        """Raises StoreError. `clock` is monotonic, in seconds; `wall` is Unix time, for people; `name` is ours."""
        self.clock, self.wall, self.name = clock, wall, name
        self.store = store
        self.ledger = Ledger(store.load())
        self.registry = self.ledger.registry
        self.counts = Counts()
        self.company = Company(self)
        self.claims = Claims(self.ledger, self._refused)
        self.hellos = Hellos(self.ledger, self._warn)
        self.turns = Turns(store, self.ledger, clock, self._publish)
        self.fanout = Fanout()
        self.commits = Commits(self.counts.live_seconds.observe)
        self.questions = Questions()
        self.sessions: dict[bytes, Session] = {}
        self.connected: dict[str, Session] = {}  # by host
        self.left: dict[str, Left] = {}  # by host: how it was when it was last connected here
        self.progress = False  # a commit was completed or a host came back: waiters look again
        self.done: list[Command] = []  # to be told once what they caused was sent
        self.afterwards: list[Callable[[], None]] = []  # what the command that is being decided does once it is durable
        self.on_commit: list[Callable[[Commit], None]] = []  # told of every commit, whoever made it
        self._said: Counter[str] = Counter()  # lines written about each host since the last sweep
        self._out: list[Out] = []
        self._opening: dict[str, bool] = {}  # hosts to be answered; True: an operator lets them adopt our content
        self._resume: set[str] = set()
        self._asking: set[str] = set()  # hosts for whose Hello it was asked what others have committed
        self._answering: dict[bytes, Session] = {}
        self.fanout.publish(self.revision, self.registry.take())

    @property
    def epoch(self) -> str:
        return self.ledger.epoch

    @property
    def revision(self) -> int:
        return self.ledger.revision

    @property
    def alarms(self) -> dict[str, dict[EndpointKey, str]]:
        return self.claims.alarms

    # -- what hosts say -------------------------------------------------------------------------------------------

    def receive(self, identity: bytes, body: bytes, user: str) -> None:
        """`user` is who the connection was authenticated as ("host key"); needed where there is no session yet."""
        if user.startswith(DISPATCHER):
            self.company.hear(body, user.partition(" ")[2], self.clock())
            return
        session = self.sessions.get(identity)
        try:
            if session is not None and (revision := wire.plain_ack(body)) >= 0:
                session.heard = self.clock()
                self._ack(session, revision, ())
                return
            message = wire.decode_from_host(body, self._known)
        except WireError as e:
            self._warn(session.host if session else quoted(user.partition(" ")[0], 64), "%s", e)
            self._out.append((identity, wire.encode_to_host(wire.Refused(str(e)))))
            return
        if isinstance(message, Hello):
            self._hello(identity, user, message)
        elif session is None:
            self._out.append((identity, wire.encode_to_host(wire.Pong(NO_SESSION))))
        else:
            session.heard = self.clock()
            self._message(session, message, len(body))

    def _known(self, raw: Any) -> Endpoint | None:
        """Most of what hosts report when they come back: it need not be decoded again."""
        if not (type(raw) is list and len(raw) > 1 and type(raw[0]) is type(raw[1]) is str):
            return None
        present = self.registry.endpoints.get(EndpointKey(raw[0], raw[1]))
        return present.endpoint if present is not None and pack_endpoint(present.endpoint) == raw else None

    def _message(self, session: Session, message: wire.FromHost, size: int) -> None:
        match message:
            case Ack(revision, failures):
                self._ack(session, revision, failures)
            case Ping():
                sent = self.fanout.publishers[session.host].sent
                self._out.append((session.identity, wire.encode_to_host(wire.Pong(sent))))
            case Claim() | Expect() | Release() | Report():
                self._ask(session, message, size)
            case Answer(seq, text):
                self.questions.answer(session.host, seq, text)
            case Hello():
                raise AssertionError("handled before")

    def _ack(self, session: Session, revision: int, failures: tuple[Failure, ...]) -> None:
        host = session.host
        publisher = self.fanout.publishers[host]
        self.counts.acknowledgements += 1
        if failures or session.failures:
            for failure in set(failures) - set(session.failures):
                self._warn(host, "%s: %s", quoted(failure.object), quoted(failure.message))
            session.failures = failures
        before = publisher.unsettled
        if publisher.ack(revision):
            self._resume.add(host)
        unsettled = publisher.unsettled
        self.company.moved = self.company.moved or unsettled != before
        if unsettled != before and (self.commits.acknowledged(host, unsettled, session.heard) or before == 0):
            self.progress = True

    def _ask(self, session: Session, message: Asking, size: int = 0) -> None:
        """It is answered when it was decided and what it changed is durable."""
        session.asked += 1
        session.asked_bytes += size
        many = session.asked + len(session.answers) > 2 * wire.MAX_REPORT
        if many or session.asked_bytes + session.answers_bytes > MAX_ASKED:
            self.drop(session.host, "asks more than it takes answers")
        else:
            self.turns.add(Said(self, session, message, size))

    def _forget(self, session: Session) -> None:
        """It ended: nobody waits for what it asked, however long the store fails."""
        if session.asked:
            self.turns.forget(lambda each: isinstance(each, Said) and each.session is session)

    def present(self, session: Session) -> bool:
        return self.sessions.get(session.identity) is session

    def answer(self, session: Session, claimed: wire.Claimed) -> None:
        self.counts.claims_refused += len(claimed.refused)
        frames = wire.encode_to_host(claimed)
        session.answers.append(frames)
        session.answers_bytes += sum(map(len, frames))
        self._answering[session.identity] = session

    def _hello(self, identity: bytes, user: str, hello: Hello) -> None:
        session = self.sessions.get(identity)
        who = user.partition(" ")[0] if session is None else session.host
        if self.company.sends_away(who, self.clock()):
            self._out.append((identity, wire.encode_to_host(wire.Refused(self.company.away))))
            return
        name, _, key = user.partition(" ") if session is None else (session.host, "", session.key)
        known = name in self.registry.hosts and name in self.fanout.publishers  # one being added may never be there
        if not known or self.ledger.keys.get(key) != name or (session is None and len(identity) != 16):
            self._warn(quoted(name, 64), "said hello with a key that is not its own any more")
            self._out.append((identity, wire.encode_to_host(wire.Refused(f"host {name} has no such key any more"))))
            return
        if hello.name not in ("", name):
            self._misnamed(identity, name, hello.name)
            return
        before = self.connected.get(name)
        if before is None:
            log.info("host %s: connected at revision %d", name, hello.revision, extra=fields(host=name))
        else:
            del self.sessions[before.identity]
            self._answering.pop(before.identity, None)
            self._forget(before)
        if before is not None and before.identity != identity:
            self._warn(name, "a new connection replaces the old one")
        fresh = Session(name, key, identity, hello, heard=self.clock(), begun=self.clock())
        fresh.fenced = bool(self.ledger.host(name).fenced)
        fresh.reported = before is not None and before.identity == identity and before.reported
        self.sessions[identity] = self.connected[name] = fresh
        self.fanout.publishers[name].close()
        given_up = hello.epoch != self.epoch and hello.revision <= self.ledger.superseded.get(hello.epoch, -1)
        self._opening[name] = given_up
        fresh.behind = hello.epoch == self.epoch and hello.revision > self.revision and self.store.shared
        if not fresh.behind:
            self._ask(fresh, hello)
        elif name not in self._asking:
            self._ask_head(fresh)

    def _ask_head(self, session: Session) -> None:
        self._asking.add(session.host)
        self.turns.ask_head(lambda: self._caught_up(session))

    def _caught_up(self, session: Session) -> None:
        """What others had committed when it said Hello is known here now."""
        self._asking.discard(session.host)
        present = self.connected.get(session.host)
        if present is session:
            session.behind = False
            self._ask(session, session.hello)
        elif present is not None and present.behind:  # it came while that was asked
            self._ask_head(present)

    def _misnamed(self, identity: bytes, name: str, said: str) -> None:
        """It would take its own guests for another host's."""
        known = f'its key is that of Host {name}: set host = "{name}" in its hostd.toml, or rename the Host'
        self._warn(name, "calls itself %s: %s", quoted(said, 64), known)
        why = f"this host calls itself {quoted(said, 64)}, {known}"
        self._out.append((identity, wire.encode_to_host(wire.Refused(why))))

    def introduced(self, session: Session, hello: Hello) -> None:
        """What its Hello changes of what is known of it. What was known when it came may have been taken back since."""
        host = self.registry.hosts[session.host]
        session.fenced = bool(self.ledger.host(host.name).fenced)
        if self.ledger.keys.get(session.key) != host.name:
            self.drop(host.name, "its key was not registered", "this host's key is not registered")
            return
        self.hellos.decide(host.name, session.key, hello, self.wall(), self.store.shared)

    def _refused(self, host: str, key: EndpointKey, message: str) -> None:
        self._warn(host, "claim of %s refused: %s", key, message)

    def ask(self, hosts: Collection[str], question: str, seconds: float = SECONDS) -> Inquiry:
        """Its future has the answers when all are here or time is up; hosts that are not connected are silent."""
        now = self.clock()
        inquiry = self.questions.begin([], now + seconds)
        elsewhere = [name for name in hosts if name not in self.connected]
        inquiry.silent += self.company.ask(elsewhere, question, inquiry, now)
        for name in hosts:
            session = self.connected.get(name)
            if session is not None:
                asked = wire.Ask(self.questions.ask(inquiry, name), question)
                self._out.append((session.identity, wire.encode_to_host(asked)))
        self.questions.settle(inquiry)
        return inquiry

    # -- connections that end -------------------------------------------------------------------------------------

    def gone(self, identity: bytes) -> None:
        """Nothing can be sent there any more."""
        session = self.sessions.get(identity)
        if session is not None:
            self.drop(session.host, "disconnected")

    def _warn(self, host: str, text: str, *values: object) -> None:
        """What hosts can make us say has a measure: the journal is everybody's, and has one itself."""
        self._said[host] += 1
        if self._said[host] < MAX_WORDS:
            log.warning("host %s: " + text, host, *values, extra=fields(host=host))
        elif self._said[host] == MAX_WORDS:
            log.warning("host %s: and more, which is not written here", host, extra=fields(host=host))

    def sweep(self) -> None:
        now = self.clock()
        self._said.clear()
        self.turns.look_again()
        for session in list(self.sessions.values()):
            if now - session.heard > SILENCE:
                self.drop(session.host, f"silent for {now - session.heard:.0f} s")
            session.reported = True  # it had its time

    def drop(self, host: str, reason: str, refused: str = "") -> None:
        """Forget the session. `refused`: tell the host why; else it will say Hello again if it is alive."""
        session = self.connected.pop(host, None)
        if session is None:
            return
        log.info("host %s: %s", host, reason, extra=fields(host=host))
        self.company.moved = True
        self.left[host] = Left(self.settled(session), session.heard)
        self.sessions.pop(session.identity, None)
        self._answering.pop(session.identity, None)
        self._forget(session)
        self._opening.pop(host, None)
        self._resume.discard(host)
        self.questions.lost(host)
        if host in self.fanout.publishers:
            self.fanout.publishers[host].close()
        word = wire.Refused(refused) if refused else wire.Pong(NO_SESSION)
        self._out.append((session.identity, wire.encode_to_host(word)))

    # -- commit, then tell ----------------------------------------------------------------------------------------

    def flush(self) -> list[Out]:
        """What is to be sent now.

        A Hello is answered when the report that follows it is known: an answer without it would take from the host,
        for a moment, what its guests need. (A report that the store does not take is not waited for.)
        """
        failing = self.turns.failing
        self.turns.turn()
        if self.turns.failing != failing:
            log.error("%s", self.turns.failing or "the store takes commits again")
        for host in [name for name in self._opening if self._may_open(self.connected[name])]:
            self._open(host, self._opening.pop(host))
        for host in self._resume:
            frames = self.fanout.publishers[host].resume(partial(self.fanout.needed, host))
            if frames is not None:
                self._out.append((self.connected[host].identity, frames))
        self._resume.clear()
        for session in list(self._answering.values()):
            if not self.fanout.publishers[session.host].waiting:
                self._out += [(session.identity, frames) for frames in session.answers]
                session.answers.clear()
                session.answers_bytes = 0
                del self._answering[session.identity]
        out, self._out = self._out, []
        return out

    def _may_open(self, session: Session) -> bool:
        return not session.behind and (session.reported or (session.asked > 0 and self._store_fails()))

    def _store_fails(self) -> bool:
        return bool(self.turns.failing or self.store.trouble)

    def _publish(self, commit: Commit, begun: float, foreign: bool) -> None:
        self._dismiss(commit)
        batch = self.registry.take()
        told = self.fanout.publish(commit.revision, batch)
        for host in batch.gone:
            self.commits.forget(host)
            self.left.pop(host, None)
        for host, frames in told:
            if frames is not None:
                self._out.append((self.connected[host].identity, frames))
        self.company.moved = True
        away = self.fanout.away if self.store.shared else ()
        self.commits.add(commit.revision, begun, self.clock(), [host for host, _ in told], away)
        self.progress = True
        if not foreign:
            self.counts.commits += 1
            self.counts.claims_granted += sum(isinstance(write.record, Holding) for write in commit.writes)
            self.counts.commit_seconds.observe(self.clock() - begun)
        for tell in self.on_commit:
            tell(commit)

    def _dismiss(self, commit: Commit) -> None:
        """Who may not be connected any more, or has lost what it takes for its own."""
        for table, key, _ in commit.writes:
            name = key[1] if table is Table.RESOURCE and key[0] == "Host" else key[0]
            session = self.connected.get(name) if table in (Table.RESOURCE, Table.HOST) else None
            if session is not None:
                self._check(session)
        for name, _ in self.ledger.displaced:
            self.drop(name, "its claims are asked for again")
        for name in self.claims.alarms.keys() - self.registry.hosts.keys():
            del self.claims.alarms[name]

    def _check(self, session: Session) -> None:
        name, state = session.host, self.ledger.host(session.host)
        next_key, lifted = state.next_key, session.fenced and not state.fenced
        session.fenced = bool(state.fenced)
        if name not in self.registry.hosts:
            self.drop(name, "was deleted", f"host {name} was deleted by an operator")
        elif self.ledger.keys.get(session.key) != name:
            self.drop(name, "its key was changed", "this host's key was changed by an operator")
        elif next_key and session.key != next_key:
            self.drop(name, "is to use its next key", "this host's next key is known now: it is to connect with it")
        elif lifted:
            self.drop(name, "its claims are asked for again")

    def _open(self, host: str, adopt: bool) -> None:
        session = self.connected[host]
        # A host that is ahead must find us older, however many revisions we have made since.
        ahead = self.ledger.host(host).ahead
        revision = self.revision if ahead is None else min(self.revision, ahead - 1)
        self._out.append((session.identity, self.fanout.open(host, session.hello, self.epoch, revision, adopt)))
        self.company.moved = True
        held = self._why_held(session)
        if not held:
            self.hellos.followed.add(host)
        else:
            what = "host %s: keeps its own state: %s; `slash32 adopt` gives it ours"
            log.error(what, host, held, extra=fields(host=host))

    def _why_held(self, session: Session) -> str:
        publisher, hello = self.fanout.publishers[session.host], session.hello
        if publisher.held and (upto := self.ledger.superseded.get(hello.epoch)) is not None:
            seen = f"it has seen revision {hello.revision} of epoch {hello.epoch}"
            publisher.held = f"{seen}, of which this store is a copy as of revision {upto}: an old one"
        return publisher.held

    def adopt(self, names: Collection[str] | None) -> list[str]:
        """An operator's word: of these hosts (None: all) those that hold back take this dispatcher's content.

        Said for all, it stands for hosts of the same old store that connect later, too. Returns their names.
        """
        wanted = self.connected.keys() if names is None else self.connected.keys() & set(names)
        held = sorted(name for name in wanted if self.fanout.publishers[name].held)
        for name in held:
            epoch, state = self.connected[name].hello.epoch, self.ledger.host(name)
            if epoch != self.epoch and names is None:
                self.ledger.write(Table.SUPERSEDED, (epoch,), ANY)
            self.ledger.set_host(name, state._replace(ahead=None))
        self.afterwards.append(lambda: self._opening.update({name: True for name in held if name in self.connected}))
        return held

    def settled(self, session: Session) -> int:
        """Everything up to this revision is in the host's kernel."""
        publisher = self.fanout.publishers.get(session.host)
        if publisher is None or not publisher.live:
            said = publisher is not None and publisher.held and session.hello.epoch == self.epoch
            return session.hello.revision if said else 0  # what it has heard need not be in its kernel yet
        oldest = publisher.unsettled
        return self.revision if oldest is None else max(oldest - 1, 0)

    def has(self, host: str, revision: int) -> bool:
        """The host's kernel has all of the revision that concerns it, whichever dispatcher it is connected to."""
        publisher = self.fanout.publishers.get(host)  # none: it is being added
        if publisher is None or publisher.has(revision):
            return publisher is not None
        found = self.company.peers.presence(host, self.clock())
        if found is None or found[1].held:
            return False
        return not self.commits.concerned(host, found[1].settled, revision)
