# Owns: the dispatcher without its sockets: what each message of a host and each word of an operator means. One thread.
# Inputs are taken one by one; `flush` commits all of them at once, durably, and only then says what is to be sent.
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from slash32 import resources, wire
from slash32.errors import quoted
from slash32.model import Endpoint, EndpointKey, Host
from slash32.policy import HostEndpoint, NetworkSet, Policy, Profile, Tier
from slash32.sync import NO_SESSION
from slash32.wire import Ack, Answer, Claim, Failure, Hello, Ping, Refusal, Release, Report, WireError

from . import store as disk
from .fanout import Fanout, Frames
from .live import Commits
from .questions import SECONDS, Inquiry, Questions
from .registry import Registry

log = logging.getLogger("slash32.dispatcher")

SILENCE = 20.0  # seconds without a word from a host: not connected
MAX_HELD = 4 * wire.MAX_REPORT  # addresses and prefixes of one host's guests: each is a route on every host
MAX_ALARMS = 1000  # of one host: it hides no other's
MAX_WORDS = 100  # lines about one host between two sweeps
Out = tuple[bytes, Frames]  # routing id, frames


@dataclass(slots=True)
class Session:
    """One connection of a host that said Hello. The routing id is random and known to nobody else."""

    host: str
    identity: bytes
    hello: Hello
    heard: float
    reported: bool = False  # its claims are known: what it needs is certain, so its Hello can be answered
    answers: list[Frames] = field(default_factory=list)
    failures: tuple[Failure, ...] = ()


class Core:
    def __init__(self, store: disk.Store, clock: Callable[[], float]) -> None:
        """Raises StoreError. `clock` is monotonic, in seconds."""
        self.store = store
        self.clock = clock
        self.registry = Registry()
        self.fanout = Fanout()
        self.commits = Commits()
        self.questions = Questions()
        self.sessions: dict[bytes, Session] = {}
        self.connected: dict[str, Session] = {}  # by host
        self.alarms: dict[str, dict[EndpointKey, str]] = {}  # refused claims, by host
        self.progress = False  # a commit was completed or a host came back: waiters look again
        self.keys: dict[str, str] = {}  # public key -> host
        self._said: Counter[str] = Counter()  # lines written about each host since the last sweep
        self.writes: list[disk.Write] = []
        self._out: list[Out] = []
        self._opening: dict[str, bool] = {}  # hosts to be answered; True: an operator lets them adopt our content
        self._resume: set[str] = set()
        self._answering: dict[bytes, Session] = {}
        self._load(store.load())

    def _load(self, saved: disk.Saved) -> None:
        self.epoch, self.revision = saved.epoch, saved.revision
        self.ahead, self.superseded = saved.ahead, saved.superseded
        for document in saved.resources:
            self.take(resources.decode(document, stored=True))
        for name, addresses in saved.addresses.items():
            if name in self.registry.hosts and addresses:
                self.registry.report_addresses(name, addresses)
        for host, endpoint in saved.endpoints:
            self.registry.claim(host, endpoint)
        self.fanout.publish(self.revision, self.registry.take())

    def take(self, resource: resources.Resource) -> None:
        """Into the registry; the caller has checked it and written it."""
        match resource:
            case Host():
                self.forget_key(resource.name)
                self.registry.put_host(resource)
                self.fanout.add_host(resource.name)
                if resource.public_key:
                    self.keys[resource.public_key] = resource.name
            case Policy():
                self.registry.put_policy(resource)
            case Profile():
                self.registry.put_profile(resource)
            case Tier():
                self.registry.put_tier(resource)
            case NetworkSet():
                self.registry.put_network_set(resource)
            case HostEndpoint():
                self.registry.put_host_endpoint(resource)

    def forget_key(self, name: str) -> None:
        old = self.registry.hosts.get(name)
        if old is not None and self.keys.get(old.public_key) == name:
            del self.keys[old.public_key]

    # -- what hosts say -------------------------------------------------------------------------------------------

    def receive(self, identity: bytes, body: bytes, user: str) -> None:
        """`user` is who the connection was authenticated as ("host key"); needed where there is no session yet."""
        session = self.sessions.get(identity)
        try:
            if session is not None and (revision := wire.plain_ack(body)) >= 0:
                session.heard = self.clock()
                self._ack(session, revision, ())
                return
            message = wire.decode_from_host(body)
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
            self._message(session, message)

    def _message(self, session: Session, message: wire.FromHost) -> None:
        match message:
            case Ack(revision, failures):
                self._ack(session, revision, failures)
            case Ping():
                sent = self.fanout.publishers[session.host].sent
                self._out.append((session.identity, wire.encode_to_host(wire.Pong(sent))))
            case Claim(seq, endpoint):
                self._answer(session, seq, self._claim(session.host, endpoint))
            case Release(seq, key):
                self._release(session.host, key)
                self._answer(session, seq, [])
            case Report(seq, endpoints):
                session.reported = True
                self._answer(session, seq, self._report(session.host, endpoints))
            case Answer(seq, text):
                self.questions.answer(session.host, seq, text)
            case Hello():
                raise AssertionError("handled before")

    def _ack(self, session: Session, revision: int, failures: tuple[Failure, ...]) -> None:
        host = session.host
        publisher = self.fanout.publishers[host]
        if failures or session.failures:
            for failure in set(failures) - set(session.failures):
                self._warn(host, "%s: %s", quoted(failure.object), quoted(failure.message))
            session.failures = failures
        before = publisher.unsettled
        if publisher.ack(revision):
            self._resume.add(host)
        unsettled = publisher.unsettled
        if unsettled != before and (self.commits.acknowledged(host, unsettled, session.heard) or before == 0):
            self.progress = True

    def _hello(self, identity: bytes, user: str, hello: Hello) -> None:
        session = self.sessions.get(identity)
        name, _, key = user.partition(" ") if session is None else (session.host, "", "")
        host = self.registry.hosts.get(name)
        if host is None or (session is None and (host.public_key != key or len(identity) != 16)):
            self._warn(quoted(name, 64), "said hello with a key that is not its own any more")
            self._out.append((identity, wire.encode_to_host(wire.Refused(f"host {name} has no such key any more"))))
            return
        if hello.name not in ("", name):
            self._misnamed(identity, name, hello.name)
            return
        before = self.connected.get(name)
        if before is None:
            log.info("host %s: connected at revision %d", name, hello.revision)
        else:
            del self.sessions[before.identity]
            self._answering.pop(before.identity, None)
        if before is not None and before.identity != identity:
            self._warn(name, "a new connection replaces the old one")
        fresh = Session(name, identity, hello, self.clock())
        fresh.reported = before is not None and before.identity == identity and before.reported
        self.sessions[identity] = self.connected[name] = fresh
        self.fanout.publishers[name].close()
        self._next_hops(host, hello)
        self._look_ahead(name, hello)
        self._opening[name] = hello.epoch != self.epoch and hello.epoch in self.superseded

    def _misnamed(self, identity: bytes, name: str, said: str) -> None:
        """It would take its own guests for another host's."""
        known = f'its key is that of Host {name}: set host = "{name}" in its hostd.toml, or rename the Host'
        self._warn(name, "calls itself %s: %s", quoted(said, 64), known)
        why = f'this host calls itself {quoted(said, 64)}, {known}'
        self._out.append((identity, wire.encode_to_host(wire.Refused(why))))

    def _next_hops(self, host: Host, hello: Hello) -> None:
        if host.addresses or hello.addresses == self.registry.reported.get(host.name, ()):
            return
        refusal = self.registry.report_addresses(host.name, hello.addresses)
        if refusal is not None:
            self._warn(host.name, "%s", refusal)
            return
        self._save_host(host.name)

    def _look_ahead(self, name: str, hello: Hello) -> None:
        """A host beyond our revision: this database is an old copy. That host keeps what it has until `adopt`."""
        seen = self.ahead.get(name)
        if hello.epoch == self.epoch and hello.revision > self.revision:
            self.ahead[name] = hello.revision
            self._warn(name, "is at revision %d, this database at %d: it is an old copy; `slash32 adopt` if wanted",
                       hello.revision, self.revision)  # fmt: skip
        elif seen is not None and (hello.epoch != self.epoch or hello.revision < seen):
            del self.ahead[name]
        if self.ahead.get(name) != seen:
            self._save_host(name)

    def _save_host(self, name: str) -> None:
        self.writes.append(disk.put_host(name, self.registry.reported.get(name, ()), self.ahead.get(name)))

    def _report(self, host: str, endpoints: tuple[Endpoint, ...]) -> list[Refusal]:
        live = {endpoint.key for endpoint in endpoints}
        for key in sorted(set(self.registry.of_host(host)) - live):
            self._release(host, key)
        for key in self.alarms.get(host, {}).keys() - live:
            self._calm(host, key)
        return [refusal for endpoint in endpoints for refusal in self._claim(host, endpoint)]

    def _claim(self, host: str, endpoint: Endpoint) -> list[Refusal]:
        present = self.registry.endpoints.get(endpoint.key)
        if present is not None and present.host == host and present.endpoint == endpoint:
            self._calm(host, endpoint.key)
            return []
        refusal = self.registry.refusal(host, endpoint)
        if refusal is None and len(self.registry.of_host(host)) >= wire.MAX_REPORT:
            refusal = f"host {host} has {wire.MAX_REPORT} endpoints, the most a host may have"
        if refusal is None and self.registry.held_with(host, endpoint) > MAX_HELD:
            refusal = f"host {host} would have more than {MAX_HELD} addresses and prefixes, the most a host may have"
        if refusal is not None:
            self.alarm(host, endpoint.key, refusal)
            return [Refusal(endpoint.key, refusal)]
        self._calm(host, endpoint.key)
        self.registry.claim(host, endpoint)
        self.writes.append(disk.put_endpoint(host, endpoint))
        return []

    def alarm(self, host: str, key: EndpointKey, message: str) -> None:
        mine = self.alarms.setdefault(host, {})
        if mine.get(key) != message and (key in mine or len(mine) < MAX_ALARMS):
            self._warn(host, "claim of %s refused: %s", key, message)
            mine[key] = message

    def _calm(self, host: str, key: EndpointKey) -> None:
        self.alarms.get(host, {}).pop(key, None)

    def _release(self, host: str, key: EndpointKey) -> None:
        self._calm(host, key)
        present = self.registry.endpoints.get(key)
        if present is not None and present.host == host:
            self.registry.release(key)
            self.writes.append(disk.delete_endpoint(key))

    def _answer(self, session: Session, seq: int, refused: list[Refusal]) -> None:
        session.answers.append(wire.encode_to_host(wire.Claimed(seq, tuple(refused))))
        self._answering[session.identity] = session
        if len(session.answers) > 2 * wire.MAX_REPORT:
            self.drop(session.host, "asks more than it takes answers")

    def ask(self, hosts: Collection[str], question: str, seconds: float = SECONDS) -> Inquiry:
        """Its future has the answers when all are here or time is up; hosts that are not connected are silent."""
        inquiry = self.questions.begin([name for name in hosts if name not in self.connected], self.clock() + seconds)
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
            log.warning("host %s: " + text, host, *values)
        elif self._said[host] == MAX_WORDS:
            log.warning("host %s: and more, which is not written here", host)

    def sweep(self) -> None:
        now = self.clock()
        self._said.clear()
        for session in list(self.sessions.values()):
            if now - session.heard > SILENCE:
                self.drop(session.host, f"silent for {now - session.heard:.0f} s")
            session.reported = True  # it had its time

    def drop(self, host: str, reason: str, refused: str = "") -> None:
        """Forget the session. `refused`: tell the host why; else it will say Hello again if it is alive."""
        session = self.connected.pop(host, None)
        if session is None:
            return
        log.info("host %s: %s", host, reason)
        self.sessions.pop(session.identity, None)
        self._answering.pop(session.identity, None)
        self._opening.pop(host, None)
        self._resume.discard(host)
        self.questions.lost(host)
        if host in self.fanout.publishers:
            self.fanout.publishers[host].close()
        word = wire.Refused(refused) if refused else wire.Pong(NO_SESSION)
        self._out.append((session.identity, wire.encode_to_host(word)))

    # -- commit, then tell ----------------------------------------------------------------------------------------

    def flush(self) -> list[Out]:
        """Raises StoreError: then nothing of this batch was told to anybody, and the dispatcher must end.

        A Hello is answered when the report that follows it is known: an answer without it would take from the host,
        for a moment, what its guests need.
        """
        if self.writes:
            self._commit()
        for host in [name for name in self._opening if self.connected[name].reported]:
            self._open(host, self._opening.pop(host))
        for host in self._resume:
            frames = self.fanout.publishers[host].resume(self.fanout.whole)
            if frames is not None:
                self._out.append((self.connected[host].identity, frames))
        self._resume.clear()
        for session in list(self._answering.values()):
            if not self.fanout.publishers[session.host].waiting:
                self._out += [(session.identity, frames) for frames in session.answers]
                session.answers.clear()
                del self._answering[session.identity]
        out, self._out = self._out, []
        return out

    def _commit(self) -> None:
        begun = self.clock()
        batch = self.registry.take()
        writes, self.writes = self.writes, []
        self.store.commit(self.revision + 1, writes)
        self.revision += 1
        told = self.fanout.publish(self.revision, batch)
        for host, frames in told:
            if frames is not None:
                self._out.append((self.connected[host].identity, frames))
        self.commits.add(self.revision, begun, self.clock(), [host for host, _ in told])
        self.progress = True

    def _open(self, host: str, adopt: bool) -> None:
        session = self.connected[host]
        # A host that is ahead must find us older, however many revisions we have made since.
        revision = min(self.revision, self.ahead[host] - 1) if host in self.ahead else self.revision
        self._out.append((session.identity, self.fanout.open(host, session.hello, self.epoch, revision, adopt)))
        held = self.fanout.publishers[host].held
        if held:
            log.error("host %s: keeps its own state: %s; `slash32 adopt` gives it ours", host, held)

    def adopt(self, names: Collection[str] | None) -> list[str]:
        """An operator's word: of these hosts (None: all) those that hold back take this dispatcher's content.

        Said for all, it stands for hosts of the same old store that connect later, too. Returns their names.
        """
        wanted = self.connected.keys() if names is None else self.connected.keys() & set(names)
        held = sorted(name for name in wanted if self.fanout.publishers[name].held)
        for name in held:
            epoch = self.connected[name].hello.epoch
            if epoch != self.epoch and names is None:
                self.superseded.add(epoch)
                self.writes.append(disk.supersede(epoch))
            if self.ahead.pop(name, None) is not None:
                self._save_host(name)
            self._opening[name] = True
        return held
