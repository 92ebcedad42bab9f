# What can happen to the disk below a dispatcher, while it runs and while it does not: what cannot be kept is refused in
# one line, all else goes on, nothing begins empty, and what was acknowledged comes back from a backup.
from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dispatcher_rig import PATIENCE, FakeHost, Rack, guest, policy
from small_disk import OnSmallDisk, SmallDisk
from under_load import WEB, left_behind

from bench.served import UnixConnection
from slash32.pack import Kind
from slash32.sync import Held

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    found = SmallDisk(tmp_path, getattr(request, "param", "tmpfs"))
    yield found
    found.close()


@pytest.fixture
def small(tmp_path: Path, disk: SmallDisk) -> Iterator[Rack]:
    rack = Rack(tmp_path)
    rack.dispatcher = OnSmallDisk(tmp_path, disk)
    yield rack
    rack.end()


def begin(rack: Rack) -> list[FakeHost]:
    hosts = rack.begin(2)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    return hosts


def names(rack: Rack) -> list[str]:
    return [each["metadata"]["name"] for each in rack.dispatcher.get("/v1/resources/gnp")["items"]]


def refused(rack: Rack, says: str) -> None:
    """An apply is, in one line; everything else goes on."""
    before = rack.dispatcher.get("/v1/status")["revision"], names(rack)
    status, body = rack.dispatcher.call("POST", "/v1/apply", {"documents": [policy("refused", WEB, WEB)]})
    assert status == 503 and len(body["errors"]) == 1, body
    (line,) = body["errors"]
    assert says in line and "d.db" in line and "\n" not in line and len(line) < 600, line
    assert line.endswith("nothing was changed"), line
    status, health = rack.dispatcher.call("GET", "/health")
    assert status == 503 and len(health["problems"]) == 1 and says in health["problems"][0], health
    assert before == (rack.dispatcher.get("/v1/status")["revision"], names(rack))
    assert all(host.in_sync for host in rack.hosts)


def fill(rack: Rack, disk: SmallDisk) -> None:
    """The last applies fit into what the log has already."""
    disk.fill()
    in_a_row = 0
    for n in range(100):
        status, _ = rack.dispatcher.call("POST", "/v1/apply", {"documents": [policy(f"last{n}", WEB, WEB)]})
        in_a_row = 0 if status == 200 else in_a_row + 1
        if in_a_row == 5:
            break
    rack.until(lambda: all(host.in_sync and host.replica.revision >= _revision(rack) for host in rack.hosts))


def _revision(rack: Rack) -> int:
    return int(rack.dispatcher.get("/v1/status")["revision"])


def _content(host: FakeHost) -> tuple[str, int]:
    return host.replica.epoch, host.replica.digest


def serves_on(rack: Rack) -> None:
    """Hosts come back, and have their state."""
    h1, h2 = rack.hosts
    content = _content(h2)
    h2.restart()
    rack.until(lambda: h1.in_sync and h2.in_sync)
    assert _content(h2) == content and not h2.replica.held
    h2.stop()
    fresh = FakeHost(rack.dispatcher, "h2")  # it has lost all it knew
    fresh.claims = dict(h2.claims)
    rack.hosts[1] = fresh
    fresh.start()
    rack.until(lambda: fresh.in_sync)
    assert _content(fresh) == content and not any(isinstance(e, Held) for e in fresh.events)


def works_again(rack: Rack) -> None:
    """What h1 waits for is granted, too."""
    h1 = rack.hosts[0]
    rack.dispatcher.apply(policy("back", WEB, WEB))
    rack.until(lambda: len(rack.dispatcher.get("/v1/endpoints")["items"]) == 3)
    assert h1.refused == {}
    rack.settle()
    assert rack.dispatcher.call("GET", "/health")[0] == 200
    assert {"p", "back"} <= set(names(rack))
    assert all(set(host.objects(Kind.POLICY)) == set(names(rack)) for host in rack.hosts)
    before = names(rack)
    rack.dispatcher.kill()
    saved = left_behind(rack.dispatcher.database)
    rack.dispatcher.start()
    rack.settle()
    assert rack.dispatcher.get("/v1/status")["revision"] >= saved.revision and names(rack) == before


def never_starts(rack: Rack, *says: str) -> str:
    """Twice: the first attempt must not make it look whole."""
    for _ in range(2):
        done = rack.dispatcher.run("run")
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert any(word in done.stderr for word in says) and "d.db" in done.stderr, done.stderr
    return done.stderr


# --- while it runs ---------------------------------------------------------------------------------------------------


@needs_root
def test_a_full_disk(small: Rack, disk: SmallDisk) -> None:
    h1, _ = begin(small)
    fill(small, disk)
    refused(small, "full")
    waiting = h1.claim(guest(9))
    serves_on(small)
    small.until(lambda: "full" in small.dispatcher.get("/v1/status")["store"])
    refused(small, "full")
    assert waiting not in h1.answered
    disk.empty()
    small.until(lambda: waiting in h1.answered)
    works_again(small)


@needs_root
def test_a_full_disk_is_well_by_itself_and_not_before(small: Rack, disk: SmallDisk) -> None:
    """Nobody asks for anything: health is what the disk is all the same."""
    begin(small)
    fill(small, disk)
    refused(small, "full")
    said = _failures(small)
    small.until(lambda: _failures(small) > said + 1)
    assert small.dispatcher.call("GET", "/health")[0] == 503
    disk.empty()
    small.until(lambda: small.dispatcher.call("GET", "/health")[0] == 200)
    assert "the store takes commits again" in small.dispatcher.log.read_text()


def _failures(rack: Rack) -> int:
    """Proposals that the store did not take, as it counts them."""
    connection = UnixConnection(rack.dispatcher.socket, PATIENCE)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return next(int(float(x.split()[1])) for x in lines if x.startswith("slash32_dispatcher_store_failures_total "))


@needs_root
@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
def test_a_disk_that_breaks_down(small: Rack, disk: SmallDisk) -> None:
    h1, _ = begin(small)
    disk.break_down()
    refused(small, "cannot be written")
    waiting = h1.claim(guest(9))
    serves_on(small)
    refused(small, "cannot be written")
    assert waiting not in h1.answered
    assert small.dispatcher.stop() == 0, "with hosts' inputs that wait"
    never_starts(small, "readonly", "Read-only", "unable to open", "I/O")
    disk.repair()
    small.dispatcher.start()
    small.until(lambda: all(host.in_sync for host in small.hosts))
    h1.claim(guest(9))
    works_again(small)


Harm = Callable[[Path], object]


def _scribble(path: Path) -> None:
    """All over, but at the beginning: much of a page is nothing."""
    noise = random.Random(8)
    with path.open("r+b") as file:
        for at in range(1000, path.stat().st_size, 1000):
            file.seek(at)
            file.write(noise.randbytes(200))


def _replace(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


RUNNING: dict[str, tuple[Harm, str]] = {
    "removed": (lambda path: path.unlink(), "No such file"),
    "all removed": (lambda path: [each.unlink() for each in path.parent.glob("d.db*")], "No such file"),
    "log removed": (lambda path: path.with_name("d.db-wal").unlink(), "No such file"),
    "replaced": (_replace, "replaced by another file"),
    "truncated": (lambda path: os.truncate(path, 0), "truncated by another program"),
    "scribbled": (_scribble, "damaged while it was used"),
    "log truncated": (lambda path: os.truncate(path.with_name("d.db-wal"), 4096), "truncated by another program"),
    "log scribbled": (lambda path: _scribble(path.with_name("d.db-wal")), "damaged while it was used"),
}


@pytest.mark.parametrize("what", RUNNING)
def test_what_is_done_to_its_file_while_it_runs(rack: Rack, what: str) -> None:
    h1, _ = begin(rack)
    harm, says = RUNNING[what]
    if what == "scribbled":
        _restart(rack)  # then all is in the file, and nothing in the log
    database = rack.dispatcher.database
    harm(database)
    refused(rack, says)
    waiting = h1.claim(guest(9))
    serves_on(rack)
    refused(rack, says)
    assert waiting not in h1.answered
    document = rack.dispatcher.get("/v1/backup")
    rack.dispatcher.kill()
    for path in database.parent.glob("d.db*"):
        path.unlink()
    rack.dispatcher.start()
    status, body = rack.dispatcher.call("POST", "/v1/restore", document)
    assert status == 200, body
    rack.until(lambda: h1.in_sync and rack.hosts[1].in_sync)
    assert [host.replica.held for host in rack.hosts] == ["", ""]
    works_again(rack)


def _restart(rack: Rack) -> None:
    assert rack.dispatcher.stop() == 0
    rack.dispatcher.start()
    rack.until(lambda: all(host.in_sync for host in rack.hosts))


def test_a_file_that_is_only_touched(rack: Rack) -> None:
    """The control: who reads the file, or touches it, stops nothing."""
    h1, _ = begin(rack)
    for touch in (os.utime, Path.read_bytes, lambda path: path.chmod(0o640)):
        touch(rack.dispatcher.database)
        touch(rack.dispatcher.database.with_name("d.db-wal"))
        rack.dispatcher.apply(policy("p", WEB, f'{WEB} && x == "{id(touch)}"'))
    assert rack.dispatcher.call("GET", "/health")[0] == 200
    h1.claim(guest(9))
    works_again(rack)


# --- while it does not -----------------------------------------------------------------------------------------------

STOPPED: dict[str, tuple[Harm, bool, tuple[str, ...]]] = {  # and whether it was killed before
    "truncated": (lambda path: os.truncate(path, 0), False, ("is empty",)),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), False, ("damaged", "malformed")),
    "scribbled": (_scribble, False, ("damaged", "malformed")),
    "removed": (lambda path: path.unlink(), True, ("the database is gone",)),
    "truncated after a kill": (lambda path: os.truncate(path, 0), True, ("is empty",)),
    "log scribbled": (lambda path: _scribble(path.with_name("d.db-wal")), True, ("commits follow",)),
    "a letter": (lambda path: path.write_text("to a friend " * 900), False, ("not a database",)),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), False, ("cannot be used",)),
}


@pytest.mark.parametrize("what", STOPPED)
def test_what_is_done_to_its_file_while_it_is_stopped(rack: Rack, what: str) -> None:
    h1, h2 = begin(rack)
    harm, kill, says = STOPPED[what]
    for n in range(5):
        rack.dispatcher.apply(policy(f"more{n}", WEB, WEB))
    for n in range(5):
        rack.dispatcher.call("DELETE", f"/v1/resources/gnp/more{n}")
    rack.settle()
    rack.dispatcher.kill() if kill else rack.dispatcher.stop()
    database = rack.dispatcher.database
    backup = database.parent / "backup"
    backup.mkdir()
    for path in database.parent.glob("d.db*"):
        shutil.copy(path, backup)
    before = [_content(host) for host in rack.hosts]
    harm(database)
    never_starts(rack, *says)
    for path in database.parent.glob("d.db*"):
        path.rmdir() if path.is_dir() else path.unlink()
    for path in backup.iterdir():
        shutil.copy(path, database.parent)
    rack.dispatcher.start()
    rack.until(lambda: h1.in_sync and h2.in_sync)
    assert [_content(host) for host in rack.hosts] == before
    h1.claim(guest(9))
    works_again(rack)


@needs_root
def test_a_full_disk_at_start(small: Rack, disk: SmallDisk) -> None:
    h1, _ = begin(small)
    assert small.dispatcher.stop() == 0
    disk.fill()
    never_starts(small, "full")
    disk.empty()
    small.dispatcher.start()
    small.until(lambda: all(host.in_sync for host in small.hosts))
    h1.claim(guest(9))
    works_again(small)
