# Owns: the connections to libvirt. hostd's main thread never calls libvirt (a domain whose hook is being answered is
# locked); these threads do, and post what they learn as values. Level-triggered: whatever an event says, the domain is
# read again, and a full scan on a timer finds what no event told. One thread for events, one per driver for reading.
from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import libvirt

from slash32.tag import TagError, parse_domain

from .sightings import (
    BadTag,
    Gone,
    How,
    Lost,
    Post,
    Runs,
    Scanned,
    Seen,
    Stopped,
    Suspended,
    Unread,
    WatchEvent,
)

SCAN_EVERY = 60.0  # seconds
RETRY_FIRST, RETRY_LAST = 0.2, 30.0
KEEPALIVE = (5, 3)  # seconds between probes, probes lost until the connection counts as dead

_RESUMED = {
    libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED: How.MIGRATED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY: How.POSTCOPY,
    libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY_FAILED: How.POSTCOPY,
}
_HANDED_OVER = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY)
_STOPPED = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "destroyed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: "migrated",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: "saved",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "failed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT: "snapshot",
}
_MIGRATING = (
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
    libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
)


def lifecycle(driver: str, uuid: str, event: int, detail: int) -> WatchEvent | None:
    """What a lifecycle event says by itself. STARTED_MIGRATED says nothing: a guest that comes does not run yet."""
    if event == libvirt.VIR_DOMAIN_EVENT_STARTED and detail != libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED:
        return Runs(uuid, How.STARTED, driver)
    if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
        return Runs(uuid, _RESUMED.get(detail, How.RESUMED), driver)
    if event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
        return Suspended(uuid, detail in _HANDED_OVER, driver)
    if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
        return Stopped(uuid, _STOPPED.get(detail, "unknown"), driver)
    return None


class Watcher:
    """Watches each URI (`qemu:///system`, `lxc:///`). `post` is called from several threads and must not block."""

    def __init__(self, uris: tuple[str, ...], post: Post, *, scan_every: float = SCAN_EVERY) -> None:
        self._loop = _Loop()
        self._workers = [_Worker(uri, post, scan_every) for uri in uris]

    def start(self) -> None:
        self._loop.start()
        for worker in self._workers:
            worker.start()

    def rescan(self) -> None:
        """A full scan soon; ends a back-off, too."""
        for worker in self._workers:
            worker.rescan()

    def refresh(self, driver: str, uuid: str) -> None:
        """Reads one domain again soon (LXC NIC hotplug, which only netlink tells)."""
        for worker in self._workers:
            if worker.driver == driver:
                worker.refresh(uuid)

    def stop(self, patience: float = 2.0) -> None:
        """A thread that waits for a locked domain is left to die with the process."""
        for worker in self._workers:
            worker.stop()
        deadline = time.monotonic() + patience
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        self._loop.stop()


class _Loop(threading.Thread):
    """libvirt's own event loop; there is one in a process."""

    _registered = False

    def __init__(self) -> None:
        super().__init__(name="libvirt-events", daemon=True)
        if not _Loop._registered:
            libvirt.virEventRegisterDefaultImpl()
            libvirt.registerErrorHandler(lambda *_: None, None)  # each error is an exception, too
            _Loop._registered = True
        self._stopping = False
        self._timer = libvirt.virEventAddTimeout(-1, lambda *_: None, None)

    def run(self) -> None:
        while not self._stopping:
            libvirt.virEventRunDefaultImpl()
        libvirt.virEventRemoveTimeout(self._timer)

    def stop(self) -> None:
        self._stopping = True
        libvirt.virEventUpdateTimeout(self._timer, 0)
        self.join(2)


class _Worker(threading.Thread):
    """One driver's connection, from opening to loss, again and again."""

    def __init__(self, uri: str, post: Post, scan_every: float) -> None:
        super().__init__(name=f"libvirt {uri}", daemon=True)
        self.driver = uri.partition(":")[0]
        self._uri = uri
        self._post = post
        self._scan_every = scan_every
        self._changed = threading.Condition()
        self._pending: set[str] = set()  # uuids to read, each once however many events there were
        self._scan_wanted = False
        self._closed = False
        self._stopping = False
        self._lost = ""  # the reason posted last
        self._retry = RETRY_FIRST

    # Called from other threads

    def rescan(self) -> None:
        with self._changed:
            self._scan_wanted = True
            self._changed.notify()

    def refresh(self, uuid: str) -> None:
        with self._changed:
            self._pending.add(uuid)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()

    # libvirt's event thread: no call into libvirt here

    def _on_lifecycle(self, _: Any, domain: Any, event: int, detail: int, __: Any) -> None:
        uuid = domain.UUIDString()
        said = lifecycle(self.driver, uuid, event, detail)
        if said is not None:
            self._post(said)
        self.refresh(uuid)

    def _on_change(self, _: Any, domain: Any, *__: Any) -> None:
        self.refresh(domain.UUIDString())

    def _on_close(self, *_: Any) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    # The worker's own thread

    def run(self) -> None:
        while not self._stopping:
            try:
                self._session()
            except libvirt.libvirtError as why:
                self._report_loss(one_line(why))
            except Exception as why:  # a watcher that dies in silence is worse than one that says so and goes on
                self._report_loss(f"{type(why).__name__}: {one_line(why)}")
            with self._changed:
                self._scan_wanted = False  # a new session begins with a scan
                self._changed.wait_for(lambda: self._stopping or self._scan_wanted, self._retry)
            self._retry = min(self._retry * 2, RETRY_LAST)

    def _session(self) -> None:
        self._closed, self._scan_wanted = False, True
        connection = libvirt.openReadOnly(self._uri)
        registered = []
        try:
            connection.registerCloseCallback(self._on_close, None)
            for kind, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._on_change),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, self._on_change),
                (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._on_change),
            ):
                registered.append(connection.domainEventRegisterAny(None, kind, callback, None))
            _keep_alive(connection)
            self._serve(connection)
        finally:
            self._release(connection, registered)

    def _release(self, connection: Any, registered: list[int]) -> None:
        """Each callback holds the connection; on a dead one these calls fail after they have let it go."""
        for callback in registered:
            with suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(callback)
        with suppress(libvirt.libvirtError):
            connection.unregisterCloseCallback()
        with suppress(libvirt.libvirtError):
            connection.close()

    def _serve(self, connection: Any) -> None:
        next_scan = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(self._something, max(0.0, next_scan - time.monotonic()))
                if self._stopping:
                    return
                if self._closed:
                    raise libvirt.libvirtError("the connection to libvirtd was closed")
                pending, self._pending = self._pending, set()
                scan = self._scan_wanted or time.monotonic() >= next_scan
                self._scan_wanted = False
            if scan:
                pending -= self._scan(connection)
                next_scan = time.monotonic() + self._scan_every
            for uuid in pending:
                self._read_one(connection, uuid)

    def _something(self) -> bool:
        return bool(self._stopping or self._closed or self._scan_wanted or self._pending)

    def _scan(self, connection: Any) -> set[str]:
        began = time.monotonic()
        found: set[str] = set()
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            if self._stopping:
                return found
            if self._read(connection, domain):
                found.add(domain.UUIDString())
        self._lost, self._retry = "", RETRY_FIRST
        self._post(Scanned(self.driver, frozenset(found), began))
        return found

    def _read_one(self, connection: Any, uuid: str) -> None:
        try:
            domain = connection.lookupByUUIDString(uuid)
        except libvirt.libvirtError as why:
            if why.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            self._post(Gone(uuid, self.driver))
            return
        if not self._read(connection, domain):
            self._post(Gone(uuid, self.driver))

    def _read(self, connection: Any, domain: Any) -> bool:
        """False: not active. Raises only when the connection is dead."""
        uuid = domain.UUIDString()
        try:
            state, reason = domain.state()
            if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED) and not domain.isActive():
                return False
            xml = domain.XMLDesc(0)
        except libvirt.libvirtError as why:
            if why.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return False
            if not connection.isAlive():
                raise
            self._post(Unread(uuid, one_line(why), self.driver))
            return True
        migrating = state == libvirt.VIR_DOMAIN_PAUSED and reason in _MIGRATING
        try:
            seen = parse_domain(xml.encode(), self.driver, absent_ok=True)
        except TagError as why:
            self._post(BadTag(uuid, domain.name(), str(why), self.driver))
        else:
            self._post(Seen(seen, state == libvirt.VIR_DOMAIN_RUNNING, migrating))
        return True

    def _report_loss(self, reason: str) -> None:
        if reason != self._lost:
            self._post(Lost(self.driver, reason))
        self._lost = reason


def _keep_alive(connection: Any) -> None:
    try:
        connection.setKeepAlive(*KEEPALIVE)
    except libvirt.libvirtError as why:
        if why.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:  # a driver inside this process cannot be lost
            raise


def one_line(why: Exception) -> str:
    return " ".join(str(why).split())[:300]
