# Owns: what the libvirt watcher tells hostd, as values. Pure, and without libvirt, so that the core can import it.
# Every `uuid` is libvirt's, lower case; every `driver` is qemu or lxc.
from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from slash32.tag import Domain


class How(str, enum.Enum):
    """Why a guest's processors run here from now on."""

    STARTED = "started"
    RESUMED = "resumed"  # unpaused, also after a migration that was cancelled
    MIGRATED = "migrated"  # the hand-over: it ran on another host until now
    POSTCOPY = "postcopy"


@dataclass(frozen=True, slots=True)
class Seen:
    """An active domain, read just now. `migrating`: paused because it comes, goes, or is not quite started."""

    domain: Domain
    running: bool
    migrating: bool


@dataclass(frozen=True, slots=True)
class BadTag:
    """An active domain whose tag is wrong. `message` is the one line for people."""

    uuid: str
    name: str
    message: str
    driver: str


@dataclass(frozen=True, slots=True)
class Unread:
    """libvirt could not give an active domain's XML; it is tried again."""

    uuid: str
    reason: str
    driver: str


@dataclass(frozen=True, slots=True)
class Gone:
    """Not active here (any more)."""

    uuid: str
    driver: str


@dataclass(frozen=True, slots=True)
class Scanned:
    """A complete scan: all active domains of a driver. One that started after `began` (monotonic) may be missing."""

    driver: str
    uuids: frozenset[str]
    began: float


@dataclass(frozen=True, slots=True)
class Lost:
    """No connection; posted once per reason. Scanned says that it is back."""

    driver: str
    reason: str


@dataclass(frozen=True, slots=True)
class Runs:
    uuid: str
    how: How
    driver: str


@dataclass(frozen=True, slots=True)
class Suspended:
    """`migrated`: handed over; this host's guest will not run again unless the migration fails."""

    uuid: str
    migrated: bool
    driver: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """`reason`: shutdown, destroyed, crashed, migrated, saved, failed, snapshot or unknown."""

    uuid: str
    reason: str
    driver: str


WatchEvent = Seen | BadTag | Unread | Gone | Scanned | Lost | Runs | Suspended | Stopped
Post = Callable[[WatchEvent], None]
