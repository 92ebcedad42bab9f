# Owns: what libvirt's events and scans mean for the agent. The watcher's threads only post; everything is taken here,
# on hostd's own thread. Touches: a queue and the eventfd that says there is something in it.
from __future__ import annotations

import logging
import os
import queue
from collections.abc import Callable

from slash32.journal import fields

from ..agent import Agent
from .operations import Operations
from .sightings import BadTag, Gone, Lost, Runs, Scanned, Seen, Stopped, Suspended, Unread, WatchEvent
from .watch import Watcher

log = logging.getLogger("slash32.hostd")


class Ear:
    """Register `fileno()`; call `hear` when it is readable."""

    def __init__(self, uris: tuple[str, ...], agent: Agent, scanned: Callable[[], None]) -> None:
        """`scanned` is called after each scan; `complete` then says whether every driver had one."""
        self.watcher = Watcher(uris, self._post)
        self.agent = agent
        self.operations = Operations(agent, self.watcher.rescan)
        self.connected = {uri.partition(":")[0]: False for uri in uris}  # driver: it answers
        self.scan_took: Callable[[str, float], None] = lambda driver, seconds: None
        self._drivers: set[str] = set()
        self._expected = len(uris)
        self._after_scan = scanned
        self._events: queue.SimpleQueue[WatchEvent] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._strangers: set[int] = set()

    def fileno(self) -> int:
        return self._bell

    def close(self) -> None:
        self.watcher.stop()

    @property
    def complete(self) -> bool:
        return len(self._drivers) >= self._expected

    def hear(self, now: float) -> None:
        os.eventfd_read(self._bell)
        while not self._events.empty():
            self._take(self._events.get(), now)

    def stranger(self, ifindex: int) -> None:
        """A guarded link that no hook told of: a NIC hot-plugged into a container shows itself nowhere else."""
        if ifindex not in self._strangers:
            self._strangers.add(ifindex)
            self.watcher.rescan()

    def link_gone(self, ifindex: int) -> None:
        self._strangers.discard(ifindex)

    def _post(self, event: WatchEvent) -> None:
        """On the watcher's threads."""
        self._events.put(event)
        os.eventfd_write(self._bell, 1)

    def _take(self, event: WatchEvent, now: float) -> None:
        operations = self.operations
        match event:
            case Seen():
                uuid = event.domain.uuid
                if not operations.ended(uuid, now):
                    self.agent.seen(event.domain, event.migrating or operations.left_lately(uuid, now), now)
            case BadTag():
                self.agent.bad_tag(event.uuid, event.message)
            case Runs():
                operations.came_back(event.uuid)
                self.agent.runs(event.uuid, now)
                if not self.agent.locals.of_domain(event.uuid):  # back from a migration that failed at the last step
                    self.watcher.refresh(event.driver, event.uuid)
            case Suspended():
                if event.migrated:
                    operations.left(event.uuid, now)
                    self.agent.migrated_away(event.uuid)
            case Stopped() | Gone():
                if not operations.beginning(event.uuid, now):
                    self.agent.released(event.uuid)
            case Scanned():
                self.agent.scanned(event.driver, event.uuids, lambda uuid: operations.begins(uuid, event.began, now))
                operations.forget(now)
                self.connected[event.driver] = True
                self.scan_took(event.driver, max(0.0, now - event.began))
                self._drivers.add(event.driver)
                self._after_scan()
            case Unread():
                about = fields(uuid=event.uuid, driver=event.driver)
                log.warning("domain %s: libvirt does not show it: %s", event.uuid, event.reason, extra=about)
            case Lost():
                self.connected[event.driver] = False
                what = "libvirt %s: %s: its guests' network stays as it is"
                log.warning(what, event.driver, event.reason, extra=fields(driver=event.driver))
