# Owns: what is known of one connection of a host, while it lasts and after it. Pure.
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.wire import Failure, Hello

from .fanout import Frames


@dataclass(slots=True)
class Session:
    """One connection of a host that said Hello. The routing id is random and known to nobody else."""

    host: str
    key: str  # it was authenticated with
    identity: bytes
    hello: Hello
    heard: float
    begun: float = 0.0  # when it said Hello
    reported: bool = False  # its claims are known: what it needs is certain, so its Hello can be answered
    behind: bool = False  # the host knows more than we do: we look what others have committed
    asked: int = 0  # inputs of its that wait to be decided,
    asked_bytes: int = 0  # and their bytes
    answers: list[Frames] = field(default_factory=list)
    answers_bytes: int = 0
    failures: tuple[Failure, ...] = ()
    fenced: bool = False  # what it claims is refused


class Left(NamedTuple):
    """Of a host that is not connected."""

    settled: int  # the revision that its kernel had
    seen: float  # monotonic seconds
