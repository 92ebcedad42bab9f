# A dispatcher that is not what its hosts have followed: an old copy, another store with the same address and key, an
# empty one, a restored one. No host loses what it has, each says why, and an operator's word resolves it.
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from dispatcher_rig import FakeHost, Rack, guest, policy
from netns import Namespace
from real_host import RealHost
from under_load import WEB

from slash32.pack import Kind
from slash32.sync import Applied

DB = 'role == "db"'


def content(host: FakeHost) -> tuple[str, int, int]:
    return host.replica.epoch, host.replica.revision, host.replica.digest


def files(rack: Rack) -> list[Path]:
    return sorted(rack.dispatcher.database.parent.glob("d.db*"))


class Shelf:
    """Copies of the database, made and put back while the dispatcher is stopped."""

    def __init__(self, rack: Rack) -> None:
        self._rack = rack
        self._folder = rack.dispatcher.folder / "shelf"

    def keep(self, name: str) -> None:
        assert self._rack.dispatcher.stop() == 0
        (self._folder / name).mkdir(parents=True)
        for path in files(self._rack):
            shutil.copy(path, self._folder / name)

    def change_to(self, name: str) -> None:
        """A name that nothing was kept under: nothing."""
        if self._rack.dispatcher.process is not None and self._rack.dispatcher.process.poll() is None:
            assert self._rack.dispatcher.stop() == 0
        for path in files(self._rack):
            path.unlink()
        if (self._folder / name).exists():
            for path in (self._folder / name).iterdir():
                shutil.copy(path, self._rack.dispatcher.database.parent)
        self._rack.dispatcher.start()


def apart(rack: Rack) -> tuple[FakeHost, FakeHost, FakeHost]:
    """Three hosts; what is done to the db guests from here on concerns h2 only."""
    h1, h2, h3 = rack.begin(3)
    h1.claim(guest(1))
    h2.claim(guest(2, "db"))
    h3.claim(guest(3))
    rack.dispatcher.apply(policy("web", WEB, WEB), policy("db", DB, WEB))
    rack.settle()
    return h1, h2, h3


def ahead(rack: Rack, host: FakeHost) -> None:
    revision = rack.dispatcher.apply(policy("more", DB, WEB))
    rack.until(lambda: host.replica.revision >= revision and host.get(Kind.POLICY, "more"))


def test_an_old_copy_is_followed_by_those_it_knows_all_of(rack: Rack) -> None:
    h1, h2, h3 = apart(rack)
    shelf = Shelf(rack)
    shelf.keep("old")
    rack.dispatcher.start()
    rack.settle()  # who comes after that hears of its revision, too
    ahead(rack, h2)
    before = [content(host) for host in rack.hosts]
    shelf.keep("new")
    shelf.change_to("old")
    rack.until(lambda: h1.in_sync and h3.in_sync and h2.replica.held)
    assert content(h2) == before[1] and [host.replica.digest for host in rack.hosts] == [d for _, _, d in before]
    assert "is another one" in h2.replica.held
    held = rack.dispatcher.get("/v1/status")["held"]
    assert list(held) == ["h2"] and "an old one" in held["h2"]
    (entry,) = [e for e in rack.dispatcher.get("/v1/audit")["items"] if e["change"] == "new epoch"]
    assert "it is an old copy: revision" in entry["what"] and entry["what"] in rack.dispatcher.log.read_text()
    shelf.change_to("new")  # the control: who followed that only goes along by itself, who followed the other does not
    rack.until(lambda: h2.in_sync and h1.replica.held and h3.replica.held)
    rack.dispatcher.call("POST", "/v1/adopt", {"all": True})
    rack.until(lambda: all(host.in_sync and not host.replica.held for host in rack.hosts))
    assert [host.replica.digest for host in rack.hosts] == [d for _, _, d in before]
    shelf.change_to("old")  # now all have heard of more than it knows
    rack.until(lambda: list(rack.dispatcher.get("/v1/status")["held"]) == ["h1", "h2", "h3"])
    assert rack.dispatcher.call("POST", "/v1/adopt", {"hosts": ["h2"]}) == (200, {"adopted": ["h2"]})
    rack.until(lambda: h2.in_sync and not h2.get(Kind.POLICY, "more"))
    assert h1.replica.held and h3.replica.held
    assert rack.dispatcher.call("POST", "/v1/adopt", {"all": True}) == (200, {"adopted": ["h1", "h3"]})
    rack.until(lambda: all(host.in_sync for host in rack.hosts))
    rack.settle()


def beyond(rack: Rack, host: FakeHost) -> None:
    """The dispatcher comes to revisions that the host has seen other content of."""
    for n in range(5):
        rack.dispatcher.apply(policy(f"other{n}", 'role == "nobody"', WEB))
    assert rack.dispatcher.get("/v1/status")["revision"] > host.replica.revision


@pytest.mark.parametrize("ends", ["stop", "kill"])
def test_no_revision_means_two_things(rack: Rack, ends: str) -> None:
    """An old copy makes as many commits as it lacks while the host that knows better is away, and starts anew."""
    h1, h2, _ = apart(rack)
    shelf = Shelf(rack)
    shelf.keep("old")
    rack.dispatcher.start()
    rack.settle()
    ahead(rack, h2)
    before = content(h2)
    h2.stop()
    rack.hosts.remove(h2)
    shelf.change_to("old")
    beyond(rack, h2)
    getattr(rack.dispatcher, ends)()
    rack.dispatcher.start()
    rack.hosts.append(h2)
    h2.start()
    rack.until(lambda: h2.replica.held and h1.in_sync)
    assert content(h2) == before and h2.get(Kind.POLICY, "more")
    assert list(rack.dispatcher.get("/v1/status")["held"]) == ["h2"]
    rack.dispatcher.call("POST", "/v1/adopt", {"all": True})
    rack.until(lambda: h2.in_sync and not h2.get(Kind.POLICY, "more"))


def test_a_restart_is_no_new_epoch_a_boot_is_one(rack: Rack) -> None:
    """After a boot nobody knows whether the disk is an old one: hosts lose nothing, and who knows more holds."""
    h1, h2, _ = apart(rack)
    before = [content(host) for host in rack.hosts]
    (note,) = rack.dispatcher.folder.glob("*.last")
    for ends in (rack.dispatcher.stop, rack.dispatcher.kill):
        ends()
        rack.dispatcher.start()
        rack.until(lambda: all(host.in_sync for host in rack.hosts))
    assert [content(host)[::2] for host in rack.hosts] == [each[::2] for each in before]
    rack.dispatcher.stop()
    note.unlink()
    for host in rack.hosts:
        host.events.clear()
    h2.replica.revision += 1  # it was told more than the disk has
    rack.dispatcher.start()
    rack.until(lambda: h1.in_sync and h2.replica.held)
    assert h1.replica.epoch != before[0][0] and h1.replica.digest == before[0][2]
    assert [event.changes for event in h1.events if isinstance(event, Applied)] == [()]
    assert "no dispatcher has used it since this machine was started" in rack.dispatcher.log.read_text()


def test_another_store_on_the_same_address_with_the_same_key(rack: Rack) -> None:
    apart(rack)
    shelf = Shelf(rack)
    shelf.keep("ours")
    before = [content(host) for host in rack.hosts]
    shelf.change_to("another")
    rack.dispatcher.apply(*(host.resource() for host in rack.hosts))
    for n in range(20):  # far beyond our revision
        rack.dispatcher.apply(policy(f"x{n}", WEB, WEB))
    rack.until(lambda: all(host.replica.held for host in rack.hosts))
    rack.until(lambda: len(rack.dispatcher.get("/v1/status")["held"]) == 3)
    assert all("is another one" in host.replica.held for host in rack.hosts)
    assert [content(host) for host in rack.hosts] == before
    shelf.change_to("ours")  # the control
    rack.until(lambda: all(host.in_sync for host in rack.hosts))
    assert [host.replica.digest for host in rack.hosts] == [d for _, _, d in before]
    shelf.change_to("a third")
    rack.dispatcher.apply(*(host.resource() for host in rack.hosts))
    rack.until(lambda: len(rack.dispatcher.get("/v1/status")["held"]) == 3)
    rack.dispatcher.call("POST", "/v1/adopt", {"all": True})
    rack.until(lambda: all(host.in_sync and not host.objects(Kind.POLICY) for host in rack.hosts))


def test_a_backup_on_an_empty_store(rack: Rack) -> None:
    h1, h2, h3 = apart(rack)
    backup = rack.dispatcher.get("/v1/backup")
    ahead(rack, h2)
    before = [content(host) for host in rack.hosts]
    h3.stop()  # it comes back later
    rack.hosts = [h1, h2]
    Shelf(rack).change_to("nothing")
    for host in (h1, h2):
        rack.until(lambda host=host: host.feed and "key" in host.feed.trouble)  # an empty one knows nobody
    assert [content(host) for host in (h1, h2, h3)] == before
    for host in (h1, h2):
        host.events.clear()
    status, body = rack.dispatcher.call("POST", "/v1/restore", backup)
    assert status == 200, body
    h3.start()
    rack.hosts = [h1, h2, h3]
    rack.until(lambda: h1.in_sync and h3.in_sync and h2.replica.held)
    assert content(h2) == before[1] and "is another one" in h2.replica.held
    rack.until(lambda: list(rack.dispatcher.get("/v1/status")["held"]) == ["h2"])
    lost = [c for host in (h1, h3) for e in host.events if isinstance(e, Applied) for c in e.changes
            if "web" in str(c) and type(c).__name__ == "Delete"]  # fmt: skip
    assert lost == [] and h1.get(Kind.POLICY, "web") and h3.get(Kind.POLICY, "web")
    assert len({host.replica.epoch for host in rack.hosts}) == 2
    rack.dispatcher.kill()  # and it stays so
    rack.dispatcher.start()
    rack.until(lambda: h1.in_sync and h3.in_sync and h2.replica.held)
    status, body = rack.dispatcher.call("POST", "/v1/restore", backup)
    assert status == 409 and "replace=1" in body["errors"][0]
    rack.until(lambda: list(rack.dispatcher.get("/v1/status")["held"]) == ["h2"])
    rack.dispatcher.call("POST", "/v1/adopt", {"hosts": ["h2"]})
    rack.until(lambda: all(host.in_sync for host in rack.hosts) and not h2.get(Kind.POLICY, "more"))
    rack.settle()


# --- with a real kernel ----------------------------------------------------------------------------------------------


@pytest.fixture
def real(here: Namespace, tmp_path: Path) -> Iterator[RealHost]:
    folder = tmp_path / "h1"
    folder.mkdir()
    host = RealHost(folder, here)
    yield host
    host.stop()


def kernel(h1: RealHost) -> str:
    return h1.inside("nft", "-s", "list", "ruleset") + h1.inside("ip", "route") + h1.inside("ip", "-6", "route")


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_a_real_host_keeps_its_kernel(rack: Rack, real: RealHost) -> None:
    fake, h2 = rack.begin(2)
    fake.stop()
    rack.hosts = [h2]
    documents = [host.resource() for host in (fake, h2)]
    shutil.copy(fake.key_file, real.state / "hostd.key")
    config = rack.dispatcher.config
    config.write_text(config.read_text().replace("tcp://127.0.0.1:", "tcp://0.0.0.0:"))
    shelf = Shelf(rack)
    shelf.keep("old")
    rack.dispatcher.start()
    real.configure(rack.dispatcher.port, rack.dispatcher.public_key)
    h2.claim(guest(2))
    real.start()
    rack.until(lambda: real.status()["in_sync"])
    rack.dispatcher.apply(policy("web-to-web", WEB, WEB))
    rack.settle()
    shelf.keep("ours")
    whole = kernel(real)
    assert "10.65.0.2" in whole
    for store, says in (("old", "another one"), ("another", "another one"), ("empty", "")):
        shelf.change_to(store)
        if store == "another":
            rack.dispatcher.apply(*documents)
        rack.until(lambda: not real.status()["in_sync"])
        if says:
            rack.until(lambda: "h1" in rack.dispatcher.get("/v1/status")["held"])
            rack.until(lambda says=says: says in real.log.read_text())
        assert kernel(real) == whole, store
    shelf.change_to("ours")
    rack.until(lambda: real.status()["in_sync"])
    rack.settle()
    assert kernel(real) == whole
    shelf.change_to("old")  # the control: what is adopted does change it
    rack.until(lambda: "h1" in rack.dispatcher.get("/v1/status")["held"])
    rack.dispatcher.call("POST", "/v1/adopt", {"all": True})
    rack.until(lambda: real.status()["in_sync"] and kernel(real) != whole)
