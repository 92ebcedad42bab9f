# Owns: what dispatchers of one store tell each other, and what is known of the others from it. Pure. State, not events:
# a roll is all there is to say of the hosts connected there; what is lost, late or doubled does no harm.
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack

from slash32.errors import quoted
from slash32.pack import WireError

FRESH = 3.0  # seconds that a roll counts
MOST_HOSTS = 100_000
_ROLL, _QUESTION, _ANSWER, _ADOPT = 1, 2, 3, 4


class Presence(NamedTuple):
    """A host that is connected to some dispatcher."""

    settled: int  # everything up to this revision is in its kernel
    lag: float = 0.0  # seconds since the oldest commit that it has not acknowledged
    held: str = ""
    version: str = ""
    filter: str = ""
    seen: float = 0.0  # Unix time
    age: float = 0.0  # seconds since it said Hello there
    failures: tuple[tuple[str, str], ...] = ()  # object, message
    alarms: tuple[tuple[str, str], ...] = ()  # endpoint, why its claim is refused: the first ones


class Roll(NamedTuple):
    """What a dispatcher says of itself and of the hosts that are connected to it."""

    revision: int
    healthy: bool  # its store takes commits
    hosts: Mapping[str, Presence]


class Question(NamedTuple):
    """An operator's, to hosts that are connected there; the JSON text."""

    seq: int
    hosts: tuple[str, ...]
    question: str


class Answer(NamedTuple):
    """JSON texts by host; who is not in it was silent."""

    seq: int
    answers: Mapping[str, str]


class Adopt(NamedTuple):
    """An operator lets these hosts (None: all) take the content of this store."""

    hosts: tuple[str, ...] | None


Word = Roll | Question | Answer | Adopt


def encode(name: str, word: Word) -> bytes:
    """`name` is the dispatcher that says it."""
    match word:
        case Roll(revision, healthy, hosts):
            body: list[Any] = [_ROLL, revision, healthy, {host: list(there) for host, there in hosts.items()}]
        case Question(seq, asked, question):
            body = [_QUESTION, seq, list(asked), question]
        case Answer(seq, answers):
            body = [_ANSWER, seq, dict(answers)]
        case Adopt(named):
            body = [_ADOPT, None if named is None else list(named)]
    return bytes(msgpack.packb([name, *body]))


def decode(data: bytes) -> tuple[str, Word]:
    """Raises WireError. It comes from a dispatcher of ours: what is wrong is a mistake, not an attack."""
    try:
        match msgpack.unpackb(data):
            case [str(name), 1, int(revision), bool(healthy), dict(hosts)]:
                return name, Roll(revision, healthy, {str(host): _presence(row) for host, row in hosts.items()})
            case [str(name), 2, int(seq), list(hosts), str(question)]:
                return name, Question(seq, tuple(map(str, hosts)), question)
            case [str(name), 3, int(seq), dict(answers)]:
                return name, Answer(seq, {str(host): str(text) for host, text in answers.items()})
            case [str(name), 4, hosts]:
                return name, Adopt(None if hosts is None else tuple(map(str, hosts)))
    except (ValueError, TypeError, msgpack.UnpackException) as e:
        raise WireError(f"another dispatcher's word: not understood ({quoted(str(e), 64)})") from None
    raise WireError("another dispatcher's word: of no known form")


def _presence(row: Any) -> Presence:
    settled, lag, held, version, filter_, seen, age, *lists = row
    failures, alarms = (tuple((str(what), str(why)) for what, why in each) for each in lists)
    about = str(held), str(version), str(filter_)
    return Presence(int(settled), float(lag), *about, float(seen), float(age), failures, alarms)


@dataclass(slots=True)
class _Heard:
    roll: Roll
    at: float


@dataclass(slots=True)
class Peers:
    """The other dispatchers of this store, as far as they have been heard. Seconds are monotonic."""

    heard: dict[str, _Heard] = field(default_factory=dict)

    def take(self, name: str, roll: Roll, now: float) -> list[tuple[str, int, bool]]:
        """Hosts there that have got further: who, how far, and whether they were there before."""
        before = self.heard.get(name)
        self.heard[name] = _Heard(roll, now)
        known: Mapping[str, Presence] = before.roll.hosts if before is not None else {}
        return [
            (host, there.settled, host in known)
            for host, there in roll.hosts.items()
            if host not in known or there.settled > known[host].settled
        ]

    def forget(self, names: Collection[str]) -> None:
        """All but these are dispatchers no more."""
        for name in self.heard.keys() - set(names):
            del self.heard[name]

    def fresh(self, now: float) -> Iterator[tuple[str, Roll]]:
        for name, heard in self.heard.items():
            if now - heard.at <= FRESH:
                yield name, heard.roll

    def presence(self, host: str, now: float) -> tuple[str, Presence] | None:
        """Where it is connected, if not here. Where two say so, it is the one that it came to last."""
        at = [(self._age(name, host, now), name) for name, roll in self.fresh(now) if host in roll.hosts]
        return (name := min(at)[1], self.heard[name].roll.hosts[host]) if at else None

    def others(self, now: float) -> dict[str, tuple[str, Presence]]:
        """All hosts that are connected elsewhere."""
        found: dict[str, tuple[str, Presence]] = {}
        for name, roll in self.fresh(now):
            for host, there in roll.hosts.items():
                if host not in found or self._age(name, host, now) < self._age(found[host][0], host, now):
                    found[host] = name, there
        return found

    def _age(self, name: str, host: str, now: float) -> float:
        heard = self.heard[name]
        return now - heard.at + heard.roll.hosts[host].age
