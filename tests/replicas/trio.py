# Owns: three dispatchers of one store in etcd, with hosts that may go to any: what the tests here play with. Between
# each dispatcher and etcd, and in front of each for the others, stands a relay that can be cut or swallow all.
from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dispatcher_rig import REPO, Dispatcher, FakeHost, turn
from etcd_rig import Etcd, Relay

from bench.served import UnixConnection
from hostd.session.feed import Applied, FeedEvent, Held, Place

PATIENCE = 40.0  # seconds until a condition that should hold is given up


def quiet_port() -> int:
    """None that the kernel gives to one of the many connections here before a dispatcher has it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class One(Dispatcher):
    """A dispatcher of several. `etcd` are the relays to the members, `door` is where the others knock."""

    address = "127.0.0.1"

    def __init__(self, folder: Path, name: str, cluster: Etcd, prefix: str) -> None:
        folder.mkdir()
        super().__init__(folder)
        self.name, self.port = name, quiet_port()
        self.etcd = [Relay(member.client_port) for member in cluster.members]
        self.door = Relay(self.port)
        scheme = "https" if cluster.tls else "http"
        members = ", ".join(f'"{scheme}://127.0.0.1:{relay.port}"' for relay in self.etcd)
        self.text = (
            f'listen = "tcp://127.0.0.1:{self.port}"\nadvertise = "tcp://127.0.0.1:{self.door.port}"\n'
            f'name = "{name}"\nsocket = "{self.socket}"\nkey_file = "{folder / "d.key"}"\n'
            f'database = "{self.database}"\netcd = [{members}]\netcd_prefix = "{prefix}"\n'
        )
        if cluster.tls:
            tls = cluster.tls
            self.text += f'etcd_ca = "{tls.ca}"\netcd_cert = "{tls.folder / "client.pem"}"\n'
            self.text += f'etcd_key = "{tls.folder / "client.key"}"\n'
        self.store("etcd")

    def store(self, kind: str) -> None:
        self.config.write_text(f'{self.text}store = "{kind}"\n')

    def begin(self) -> None:
        """Does not wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command("run"), cwd=REPO, stderr=log)

    def migrate(self, to: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "dispatcher", "store", "migrate", "--to", to, "--config", str(self.config)]
        return subprocess.run(words, check=False, cwd=REPO, capture_output=True, text=True, timeout=PATIENCE)

    @property
    def place(self) -> Place:
        return Place(f"tcp://{self.address}:{self.port}", self.public_key)

    def cut(self, etcd: bool = True, others: bool = True) -> None:
        """What it hears and says goes nowhere; no connection is closed."""
        for relay in (*(self.etcd if etcd else ()), *((self.door,) if others else ())):
            relay.swallow = "all"

    def heal(self) -> None:
        for relay in (*self.etcd, self.door):
            relay.heal()

    def pause(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def revision(self) -> int:
        return int(self.get("/v1/status")["revision"])

    def metric(self, name: str) -> float:
        lines = self.text_of("/metrics").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    def text_of(self, path: str) -> str:
        connection = UnixConnection(self.socket, PATIENCE)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()


class Guest(FakeHost):
    """A host that remembers when what happened."""

    def __init__(self, trio: Trio, name: str, at: Iterable[One]) -> None:
        super().__init__(trio.all[0], name)
        self.places = tuple(one.place for one in at)
        self.trio = trio
        self.synced: list[tuple[float, str]] = []  # when it was in sync newly, and where

    def take(self, events: list[FeedEvent]) -> None:
        super().take(events)
        if self.feed is not None and any(isinstance(event, Applied) for event in events):
            where = self.at
            if where is not None and (not self.synced or self.synced[-1][1] != where.name):
                self.synced.append((time.monotonic(), where.name))

    @property
    def at(self) -> One | None:
        """Where it is in sync now."""
        endpoint = self.feed.endpoint if self.feed is not None else ""
        found = next((one for one in self.trio.all if one.place.endpoint == endpoint), None)
        return found if self.in_sync else None

    @property
    def was_held(self) -> bool:
        return any(isinstance(event, Held) for event in self.events)

    @property
    def snapshots(self) -> int:
        return sum(isinstance(event, Applied) and event.snapshot for event in self.events)


class Trio:
    def __init__(self, cluster: Etcd, folder: Path, prefix: str) -> None:
        self.cluster, self.folder, self.prefix = cluster, folder, prefix
        self.all = [One(folder / name, name, cluster, prefix) for name in ("d1", "d2", "d3")]
        self.hosts: list[Guest] = []

    def begin(self, count: int, spread: bool = False) -> list[Guest]:
        """`spread`: each host may go to one dispatcher only, one after the other."""
        self.start()
        return self.enter(count, self.all, spread)

    def enter(self, count: int, at: list[One], spread: bool = False) -> list[Guest]:
        names = [f"h{n}" for n in range(1, count + 1)]
        self.hosts = [Guest(self, name, [at[n % len(at)]] if spread else at) for n, name in enumerate(names)]
        revision = at[0].apply(*(host.resource() for host in self.hosts))
        self.follow(revision, *at)
        for host in self.hosts:
            host.start()
        self.until(lambda: all(host.in_sync for host in self.hosts))
        return self.hosts

    def start(self) -> None:
        for one in self.all:
            one.begin()
        self.until(lambda: all(one.answers() or not one.runs for one in self.all))
        for one in self.all:
            assert one.runs, one.log.read_text()
        self.until(lambda: all(len(one.get("/v1/dispatchers")["items"]) == 3 for one in self.all))

    def follow(self, revision: int, *some: One) -> None:
        self.until(lambda: all(one.revision >= revision for one in some or self.all if one.runs))

    def until(self, holds: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        end = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < end, "gave up waiting"
            turn(list(self.hosts), 0.02)
        return found

    def for_a_while(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            turn(list(self.hosts), 0.02)

    def wait_live(self, one: One, revision: int) -> dict[str, Any]:
        path = f"/v1/revisions/{revision}"
        self.until(lambda: one.revision >= revision and one.get(path)["done"])
        found: dict[str, Any] = one.get(path)
        return found

    def settle(self) -> int:
        """All dispatchers have the same revision and every host has it, and each of them knows that."""
        running = [one for one in self.all if one.runs]
        self.until(lambda: len({one.revision for one in running}) == 1)
        revision = running[0].revision
        for one in running:
            self.wait_live(one, revision)
        return revision

    def end(self) -> None:
        for host in self.hosts:
            host.stop()
        for one in self.all:
            if one.process is not None:
                one.resume()
                if one.runs:
                    one.kill()
            for relay in (*one.etcd, one.door):
                relay.close()


def content(saved: Any) -> dict[str, Any]:
    """Of a backup: what it holds, by what it is."""
    return {"epoch": saved["epoch"], "revision": saved["revision"], "records": sorted(map(str, saved["records"]))}
