# The watcher against the real library and its built-in test driver (real events, real XML); a connection that dies and
# a driver that is missing through a stand-in for libvirt's open. Real daemons: tests/system/test_watch.py.
from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import pytest

from hostd.guests import watch
from hostd.guests.sightings import BadTag, Gone, How, Lost, Runs, Scanned, Seen, Stopped, Suspended, Unread, WatchEvent
from hostd.guests.watch import Watcher, lifecycle

URI = "test:///default"
UUID = "6e85e5f0-4ea9-4267-9ec6-22ff2194af6c"
TAG = (
    '<slash32:endpoint xmlns:slash32="urn:slash32:domain:1"><slash32:label key="role" value="{}"/><slash32:interface>'
    "<slash32:address>10.65.0.2</slash32:address></slash32:interface></slash32:endpoint>"
)
DOMAIN = f"""<domain type='test'><name>web1</name><uuid>{UUID}</uuid><metadata>{TAG.format("web")}</metadata>
<memory>65536</memory><os><type>hvm</type></os><devices><interface type='ethernet'>
<mac address='52:54:00:00:00:02'/></interface></devices></domain>"""


class Heard:
    """What was posted, in order."""

    def __init__(self) -> None:
        self.events: list[WatchEvent] = []
        self.all: list[WatchEvent] = []
        self.changed = threading.Condition()

    def post(self, event: WatchEvent) -> None:
        with self.changed:
            self.events.append(event)
            self.all.append(event)
            self.changed.notify_all()

    def wait(self, wanted: Callable[[WatchEvent], bool], seconds: float = 20) -> WatchEvent:
        """The first such event that has not been waited for; all before it are dropped."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while True:
                for at, event in enumerate(self.events):
                    if wanted(event):
                        del self.events[: at + 1]
                        return event
                assert self.changed.wait(max(0.0, deadline - time.monotonic())), f"only {self.events}"

    def get(self, event: WatchEvent) -> None:
        self.wait(lambda e: e == event)

    def scan(self) -> Scanned:
        found = self.wait(lambda e: isinstance(e, Scanned))
        assert isinstance(found, Scanned)
        return found

    def seen(self, **values: object) -> Seen:
        def wanted(event: WatchEvent) -> bool:
            return isinstance(event, Seen) and event.domain.uuid == UUID

        found = self.wait(wanted)
        assert isinstance(found, Seen)
        assert {key: getattr(found, key) for key in values} == values
        return found


@pytest.fixture
def host() -> Iterator[Any]:
    """Another client of the same driver state; domains that a test leaves are removed."""
    connection = libvirt.open(URI)
    yield connection
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        if domain.name() != "test":
            domain.destroy()
    connection.close()


@pytest.fixture
def heard(host: Any) -> Iterator[Heard]:
    listener = Heard()
    watcher = Watcher((URI,), listener.post)
    listener.watcher = watcher  # type: ignore[attr-defined]
    watcher.start()
    yield listener
    before = time.monotonic()
    watcher.stop()
    assert time.monotonic() - before < 10
    assert not any(thread.name.startswith("libvirt") for thread in threading.enumerate())


def labels(seen: Seen) -> dict[str, str]:
    return {key: value for endpoint, _ in seen.domain.endpoints for key, value in endpoint.labels.items()}


def test_first_a_full_scan(host: Any, heard: Heard) -> None:
    scan = heard.scan()
    assert scan.driver == "test" and scan.uuids == {d.UUIDString() for d in host.listAllDomains()}
    assert scan.began <= time.monotonic()


def test_life_of_a_domain(host: Any, heard: Heard) -> None:
    heard.scan()
    domain = host.createXML(DOMAIN)
    heard.get(Runs(UUID, How.STARTED, "test"))
    seen = heard.seen(running=True, migrating=False)
    assert seen.domain.tagged and labels(seen) == {"role": "web"} and seen.domain.driver == "test"
    domain.suspend()
    heard.get(Suspended(UUID, False, "test"))
    heard.seen(running=False, migrating=False)
    domain.resume()
    heard.get(Runs(UUID, How.RESUMED, "test"))
    heard.seen(running=True)
    domain.destroy()
    heard.get(Stopped(UUID, "destroyed", "test"))
    heard.get(Gone(UUID, "test"))


def test_defined_is_not_active(host: Any, heard: Heard) -> None:
    heard.scan()
    domain = host.defineXML(DOMAIN)
    heard.get(Gone(UUID, "test"))
    domain.create()
    heard.seen(running=True)
    domain.shutdown()
    heard.wait(lambda e: isinstance(e, Stopped) and e.reason == "shutdown")
    heard.get(Gone(UUID, "test"))
    domain.undefine()
    heard.get(Gone(UUID, "test"))


def test_live_re_tagging(host: Any, heard: Heard) -> None:
    domain = host.createXML(DOMAIN)
    assert labels(heard.seen()) == {"role": "web"}
    for value in ("db", "app"):
        new = re.sub(r"slash32:| xmlns:\S+(?=>)", "", TAG.format(value))  # as `virsh metadata` gives and wants it
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        assert new.startswith("<endpoint><label ")
        domain.setMetadata(kind, new, "slash32", "urn:slash32:domain:1", libvirt.VIR_DOMAIN_AFFECT_LIVE)
        found = heard.wait(lambda e: isinstance(e, Seen) and labels(e) == {"role": value})  # noqa: B023
        assert isinstance(found, Seen) and found.domain.uuid == UUID


def test_a_bad_tag_names_the_domain(host: Any, heard: Heard) -> None:
    host.createXML(DOMAIN.replace("10.65.0.2", "10.65.0.999"))
    bad = heard.wait(lambda e: isinstance(e, BadTag))
    assert isinstance(bad, BadTag) and (bad.uuid, bad.name, bad.driver) == (UUID, "web1", "test")
    assert "'10.65.0.999' is not an address" in bad.message
    heard.watcher.rescan()  # type: ignore[attr-defined]
    assert UUID in heard.wait(lambda e: isinstance(e, Scanned) and UUID in e.uuids).uuids  # type: ignore[union-attr]


def test_rescan_and_refresh_on_request(host: Any, heard: Heard) -> None:
    heard.scan()
    watcher = heard.watcher  # type: ignore[attr-defined]
    watcher.rescan()
    heard.scan()
    (uuid,) = [d.UUIDString() for d in host.listAllDomains()]
    watcher.refresh("qemu", uuid)
    watcher.refresh("test", "0" * 8 + "-0000-0000-0000-" + "0" * 12)
    heard.wait(lambda e: isinstance(e, Gone))
    watcher.refresh("test", uuid)
    assert heard.wait(lambda e: not isinstance(e, Scanned)).domain.uuid == uuid  # type: ignore[union-attr]


def test_scans_on_its_timer(host: Any) -> None:
    heard = Heard()
    watcher = Watcher((URI,), heard.post, scan_every=0.05)
    watcher.start()
    begun = [heard.scan().began for _ in range(5)]
    watcher.stop()
    assert begun == sorted(set(begun))


def test_many_events_few_reads(host: Any, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a domain is locked by its hook, whatever happens to it costs one read afterwards."""
    heard.scan()
    unlock, reading = threading.Event(), threading.Event()
    real = libvirt.virDomain.state

    def locked(self: Any, flags: int = 0) -> Any:
        reading.set()
        unlock.wait(20)
        return real(self, flags)

    monkeypatch.setattr(libvirt.virDomain, "state", locked)
    domain = host.createXML(DOMAIN)
    assert reading.wait(20)
    for _ in range(20):
        domain.suspend()
        domain.resume()
    for _ in range(20):
        heard.get(Runs(UUID, How.RESUMED, "test"))
    assert not any(isinstance(e, Seen) for e in heard.events)
    unlock.set()
    heard.seen()
    heard.seen(running=True)
    heard.watcher.rescan()  # type: ignore[attr-defined]
    heard.seen()
    heard.scan()
    assert not any(isinstance(e, Seen) for e in heard.events)


def test_a_domain_that_cannot_be_read_is_told_and_is_not_gone(
    host: Any, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard.scan()

    def busy(self: Any, flags: int = 0) -> str:
        raise libvirt.libvirtError("busy\nvery")

    monkeypatch.setattr(libvirt.virDomain, "XMLDesc", busy)
    host.createXML(DOMAIN)
    heard.get(Unread(UUID, "busy very", "test"))
    heard.watcher.rescan()  # type: ignore[attr-defined]
    heard.wait(lambda e: isinstance(e, Scanned) and UUID in e.uuids)


def test_a_missing_driver_is_told_once(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY_LAST", 0.01)
    tries = threading.Semaphore(0)
    real = libvirt.openReadOnly

    def counted(uri: str) -> Any:
        tries.release()
        return real(uri)

    monkeypatch.setattr(libvirt, "openReadOnly", counted)
    heard = Heard()
    watcher = Watcher(("test:///no/such/file", URI), heard.post)
    watcher.start()
    heard.wait(lambda e: isinstance(e, Scanned))
    for _ in range(5):
        assert tries.acquire(timeout=20)
    watcher.stop()
    lost = [e for e in heard.all if isinstance(e, Lost)]
    assert len(lost) == 1 and lost[0].reason.isprintable()


def test_a_lost_connection_is_told_and_made_again(host: Any, heard: Heard) -> None:
    heard.scan()
    worker = heard.watcher._workers[0]  # type: ignore[attr-defined]
    worker._on_close(None, 0, None)
    lost = heard.wait(lambda e: isinstance(e, Lost))
    assert isinstance(lost, Lost) and lost.driver == "test" and "closed" in lost.reason
    heard.scan()
    host.createXML(DOMAIN)
    heard.get(Runs(UUID, How.STARTED, "test"))
    assert not any(isinstance(e, Runs) for e in heard.events), "the old callbacks are gone: each event comes once"


def test_an_error_of_ours_is_told_and_does_not_end_the_watch(
    host: Any, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard.scan()
    with monkeypatch.context() as patch:
        patch.setattr(watch, "parse_domain", lambda *_, **__: 1 // 0)
        heard.watcher.rescan()  # type: ignore[attr-defined]
        lost = heard.wait(lambda e: isinstance(e, Lost))
    assert isinstance(lost, Lost) and "ZeroDivisionError" in lost.reason
    heard.scan()


def test_the_guest_of_a_migration_runs_only_when_it_resumes() -> None:
    started, resumed, suspended = (
        libvirt.VIR_DOMAIN_EVENT_STARTED, libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED,
    )  # fmt: skip
    told = {
        (started, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED): Runs(UUID, How.STARTED, "qemu"),
        (started, libvirt.VIR_DOMAIN_EVENT_STARTED_RESTORED): Runs(UUID, How.STARTED, "qemu"),
        (started, libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED): None,
        (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED): Runs(UUID, How.RESUMED, "qemu"),
        (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED): Runs(UUID, How.MIGRATED, "qemu"),
        (resumed, libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY): Runs(UUID, How.POSTCOPY, "qemu"),
        (suspended, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_PAUSED): Suspended(UUID, False, "qemu"),
        (suspended, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED): Suspended(UUID, True, "qemu"),
        (suspended, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY): Suspended(UUID, True, "qemu"),
        (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED): Stopped(
            UUID, "migrated", "qemu"
        ),
        (libvirt.VIR_DOMAIN_EVENT_STOPPED, 99): Stopped(UUID, "unknown", "qemu"),
        (libvirt.VIR_DOMAIN_EVENT_DEFINED, 0): None,
    }
    for (event, detail), expected in told.items():
        assert lifecycle("qemu", UUID, event, detail) == expected


def test_every_way_to_stop_has_a_name() -> None:
    details = {v for k, v in vars(libvirt).items() if re.fullmatch("VIR_DOMAIN_EVENT_STOPPED_[A-Z_]+", k)}
    names = {lifecycle("qemu", UUID, libvirt.VIR_DOMAIN_EVENT_STOPPED, d).reason for d in details}  # type: ignore[union-attr]
    assert "unknown" not in names and len(names) == len(details)
