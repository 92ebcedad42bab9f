# A real dispatcher process on loopback and hosts made of the real feed: what the contract tests play with.
from __future__ import annotations

import http.client
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.served import UnixConnection, free_port, memory
from hostd.session.feed import Asked, ClaimAnswer, Connected, Disconnected, Feed, FeedConfig, FeedEvent, Place
from slash32.keys import KeyPair, load_or_create_key
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.pack import AddressSet, Kind, ObjectKey, Value
from slash32.sync import Applied, Held, Replica
from slash32.wire import Failure

REPO = Path(__file__).resolve().parents[2]
WEB, DB = 'role == "web"', 'role == "db"'
PATIENCE = 20.0  # seconds until a condition that should hold is given up


class Dispatcher:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.config = folder / "dispatcher.toml"
        self.database, self.socket = folder / "d.db", folder / "api.sock"
        self.config.write_text(
            f'listen = "tcp://127.0.0.1:{self.port}"\ndatabase = "{self.database}"\n'
            f'socket = "{self.socket}"\nkey_file = "{folder / "d.key"}"\n'
        )
        self.public_key = load_or_create_key(folder / "d.key").public
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command("run"), cwd=REPO, stderr=log)
        until(lambda: self.answers() or self.process is None or self.process.poll() is not None)
        assert self.answers(), self.log.read_text()

    def command(self, verb: str) -> list[str]:
        return [sys.executable, "-m", "dispatcher", verb, "--config", str(self.config)]

    def run(self, verb: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(verb), check=False, cwd=REPO, capture_output=True, text=True, timeout=PATIENCE
        )

    def answers(self) -> bool:
        try:
            return self.call("GET", "/v1/status")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def kill(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        assert self.process
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(10)

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        connection = UnixConnection(self.socket, PATIENCE)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, body = self.call("GET", path)
        assert status == 200, body
        return body

    def apply(self, *documents: dict[str, Any]) -> int:
        status, body = self.call("POST", "/v1/apply", {"documents": list(documents)})
        assert status == 200, body
        return int(body["revision"])


def document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def policy(name: str, selector: str, source: str) -> dict[str, Any]:
    return document(
        "GlobalNetworkPolicy", name, selector=selector, ingress=[{"action": "Allow", "source": {"selector": source}}]
    )


def guest(n: int, role: str = "web", *addresses: str, **more: Any) -> Endpoint:
    found = addresses or (f"10.65.0.{n}",)
    key = EndpointKey(f"00000000-0000-0000-0000-{n:012x}", f"52:54:00:00:{n >> 8:02x}:{n & 255:02x}")
    return Endpoint(key, f"web{n}", {"role": role}, addresses=tuple(map(parse_address, found)), **more)


def members(*addresses: str) -> AddressSet:
    return AddressSet(set(map(parse_address, addresses)))


class FakeHost:
    """What hostd does with its feed, without a kernel: `applied` stands for it."""

    def __init__(self, dispatcher: Dispatcher, name: str) -> None:
        self.name = name
        self.dispatcher = dispatcher
        self.key_file = dispatcher.folder / f"{name}.key"
        self.keys: KeyPair = load_or_create_key(self.key_file)
        self.replica = Replica()
        self.claims: dict[EndpointKey, Endpoint] = {}
        self.refused: dict[EndpointKey, str] = {}
        self.answered: set[int] = set()
        self.events: list[FeedEvent] = []
        self.failures: list[Failure] = []
        self.acknowledges = True
        self.calls_itself = name
        self.places = (Place(f"tcp://127.0.0.1:{dispatcher.port}", dispatcher.public_key),)
        self.asked: list[Asked] = []
        self.says: str | None = None  # to whatever it is asked; None: nothing
        self.feed: Feed | None = None

    def resource(self, **spec: Any) -> dict[str, Any]:
        number = int("".join(filter(str.isdigit, self.name)))
        address = f"192.0.{2 + number // 250}.{number % 250 + 1}"
        return document("Host", self.name, **{"publicKey": self.keys.public, "addresses": [address], **spec})

    def start(self) -> None:
        self.feed = Feed(FeedConfig(self.places, self.key_file, host=self.calls_itself), self.replica)

    def stop(self) -> None:
        if self.feed is not None:
            self.feed.close()
        self.feed = None

    def restart(self) -> None:
        self.stop()
        self.replica = Replica.load(self.replica.dump())
        self.start()

    def claim(self, endpoint: Endpoint) -> int:
        assert self.feed
        self.claims[endpoint.key] = endpoint
        return self.feed.claim(endpoint)

    def release(self, key: EndpointKey) -> int:
        assert self.feed
        self.claims.pop(key, None)
        return self.feed.release(key)

    def take(self, events: list[FeedEvent]) -> None:
        assert self.feed
        self.events += events
        for event in events:
            match event:
                case Connected():
                    self.feed.report(self.claims.values())
                case Applied(revision):
                    if self.acknowledges:
                        self.feed.ack(revision, self.failures)
                case ClaimAnswer(seq, refused):
                    self.answered.add(seq)
                    for refusal in refused:
                        self.refused[refusal.key] = refusal.message
                        self.claims.pop(refusal.key, None)
                case Asked(seq):
                    self.asked.append(event)
                    if self.says is not None:
                        self.feed.answer(seq, self.says)
                case Disconnected() | Held():
                    pass

    def objects(self, kind: Kind) -> dict[Any, Value]:
        return dict(self.replica.objects(kind))

    def get(self, kind: Kind, name: str) -> Value | None:
        return self.replica.get(ObjectKey(kind, name))

    @property
    def in_sync(self) -> bool:
        return self.feed is not None and self.feed.in_sync


def turn(hosts: list[FakeHost], seconds: float = 0.05) -> None:
    """Lets the hosts take what has come."""
    running = [host for host in hosts if host.feed is not None]
    poll = select.poll()  # select() knows descriptors below 1024 only
    for host in running:
        assert host.feed
        poll.register(host.feed.fileno(), select.POLLIN)
    poll.poll(seconds * 1000)
    for host in running:
        assert host.feed
        host.take(host.feed.ready(time.monotonic()))
        host.take(host.feed.tick(time.monotonic()))


def until(holds: Callable[[], Any], hosts: list[FakeHost] | None = None) -> None:
    """Polls a condition; the deadline is only for a test that fails."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "gave up waiting"
        turn(hosts or [])


class Rack:
    """A dispatcher with hosts that are known to it."""

    def __init__(self, folder: Path) -> None:
        self.dispatcher = Dispatcher(folder)
        self.hosts: list[FakeHost] = []

    def begin(self, count: int) -> list[FakeHost]:
        self.dispatcher.start()
        self.hosts = [FakeHost(self.dispatcher, f"h{n}") for n in range(1, count + 1)]
        self.dispatcher.apply(*(host.resource() for host in self.hosts))
        for host in self.hosts:
            host.start()
        self.until(lambda: all(host.in_sync for host in self.hosts))
        return self.hosts

    def until(self, holds: Callable[[], Any]) -> None:
        until(holds, self.hosts)

    def wait_live(self, revision: int) -> dict[str, Any]:
        self.until(lambda: self.dispatcher.get(f"/v1/revisions/{revision}")["done"])
        found: dict[str, Any] = self.dispatcher.get(f"/v1/revisions/{revision}")
        return found

    def answered(self, host: FakeHost, seq: int) -> str | None:
        """The refusal, once the answer is here."""
        self.until(lambda: seq in host.answered)
        return next(reversed(host.refused.values()), None)

    def settle(self) -> None:
        self.wait_live(int(self.dispatcher.get("/v1/status")["revision"]))

    def end(self) -> None:
        for host in self.hosts:
            host.stop()
        if self.dispatcher.process is not None:
            self.dispatcher.stop()


def memory_kib(pid: int) -> int:
    return memory(pid) >> 10


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
