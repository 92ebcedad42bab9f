# Owns: the messages between a host and the dispatcher, as values. Their bytes: slash32.wire. Pure.
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from slash32 import pack
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address
from slash32.pack import AddressSet, Kind, ObjectKey, Value

PROTOCOL = 3


class Put(NamedTuple):
    """The object is now `value`, whatever it was."""

    kind: Kind
    name: pack.Name
    value: Value

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.kind, self.name)


class Delete(NamedTuple):
    kind: Kind
    name: pack.Name

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.kind, self.name)


class Members(NamedTuple):
    """Members that joined and left a set."""

    name: str
    add: AddressSet
    remove: AddressSet

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(Kind.SET, self.name)


Change = Put | Delete | Members


class Failure(NamedTuple):
    """What a host could not put into its kernel; `object` is a text for people ("policy allow-web")."""

    object: str
    message: str


class Refusal(NamedTuple):
    key: EndpointKey
    message: str


class Hello(NamedTuple):
    """Opens a session: what the host holds (epoch "" when nothing), its next-hop addresses, what it takes for its
    name (the key says which host it is; "" is not compared), and words about it (ABOUT)."""

    epoch: str
    revision: int
    digest: int
    addresses: tuple[Address, ...] = ()
    protocol: int = PROTOCOL
    name: str = ""
    about: Mapping[str, str] = MappingProxyType({})


class Report(NamedTuple):
    """All live claims of the host; what it lacks is released."""

    seq: int
    endpoints: tuple[Endpoint, ...]


class Claim(NamedTuple):
    seq: int
    endpoint: Endpoint


class Release(NamedTuple):
    """Neither claimed nor expected any more."""

    seq: int
    key: EndpointKey


class Expect(NamedTuple):
    """This guest is on its way here by a live migration: nothing of it is claimed before it runs, but what its policies
    need is to be here then. A Report ends all of a host's expectations."""

    seq: int
    endpoint: Endpoint


class Ack(NamedTuple):
    """Everything up to `revision` is in the host's kernel, but for the failures (the whole list, each time)."""

    revision: int
    failures: tuple[Failure, ...] = ()


class Ping(NamedTuple):
    pass


class Snapshot(NamedTuple):
    """All the host needs, replacing what it holds. `adopt`: an operator said so, whatever the host's epoch."""

    epoch: str
    revision: int
    digest: int
    adopt: bool
    objects: tuple[Change, ...]  # Put, and Members that complete a big set


class Delta(NamedTuple):
    epoch: str
    previous: int  # the revision it follows, for this host
    revision: int
    digest: int  # of the host's whole content after it
    changes: tuple[Change, ...]


class Claimed(NamedTuple):
    """Answers the Report, Claim, Expect or Release of that number."""

    seq: int
    refused: tuple[Refusal, ...] = ()


class Pong(NamedTuple):
    """`revision` is the last one sent to this host: a host that has another one missed something."""

    revision: int


class Refused(NamedTuple):
    """The dispatcher will not talk to this host; the reason."""

    message: str


class Ask(NamedTuple):
    """A question of an operator to this host; both are JSON texts (slash32.questions says of what form)."""

    seq: int
    question: str


class Answer(NamedTuple):
    seq: int
    answer: str


FromHost = Hello | Report | Claim | Expect | Release | Ack | Ping | Answer
FromDispatcher = Snapshot | Delta | Claimed | Pong | Refused | Ask
