# A fleet as `bench.fanout` has it: what hosts, endpoints and policies there are, and the real dispatcher process that
# serves them from its own folder. Touches: that folder, that process.
from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slash32.keys import KeyPair, load_or_create_key
from slash32.model import Endpoint, EndpointKey
from slash32.net import format_address

REPO = Path(__file__).resolve().parents[1]
PATIENCE = 300.0  # seconds until what should happen is given up
ROLES = 20
SHARED = 50  # one endpoint of so many is in the group that everybody asks for
EVERYBODY, FEW = "everybody", "few"  # policies


@dataclass(frozen=True)
class Fleet:
    """Its hosts' guests: each host has one role; some are of the group that all hosts need to know."""

    hosts: int
    endpoints: int

    @cached_property
    def names(self) -> list[str]:
        return [f"h{number}" for number in range(self.hosts)]

    @property
    def few(self) -> range:
        """The hosts, 1 % of all, to which a policy of their own applies."""
        return range(max(1, self.hosts // 100))

    def of_host(self, host: int) -> range:
        return range(host, self.endpoints, self.hosts)

    def endpoint(self, number: int, grouped: bool | None = None) -> Endpoint:
        host = number % self.hosts
        labels = {"role": f"r{host % ROLES}", "group": f"g{number % SHARED}"}
        if grouped is not None:
            labels["group"] = "g0" if grouped else "none"
        if host in self.few:
            labels["site"] = "few"
        key = EndpointKey(f"00000000-0000-0000-0000-{number:012x}", "52:54:00:" + number.to_bytes(3, "big").hex(":"))
        return Endpoint(key, f"guest{number}", labels, (), ((0x0A010000 + number).to_bytes(4, "big"),))

    def documents(self, keys: Iterable[KeyPair]) -> list[dict[str, Any]]:
        hosts = [
            _document("Host", name, publicKey=pair.public, addresses=[_next_hop(n)])
            for n, (name, pair) in enumerate(zip(self.names, keys, strict=True))
        ]
        roles = [_policy(f"role{n}", f'role == "r{n}"', f'role == "r{(n + 1) % ROLES}"', 80) for n in range(ROLES)]
        return [*hosts, *roles, self.policy(EVERYBODY, 80), self.policy(FEW, 80)]

    def policy(self, name: str, port: int) -> dict[str, Any]:
        if name == FEW:
            return _policy(FEW, 'site == "few"', 'role == "r0"', port)
        return _policy(EVERYBODY, "all()", 'group == "g0"', port)


def _document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _policy(name: str, selector: str, source: str, port: int) -> dict[str, Any]:
    rule = {"action": "Allow", "protocol": "TCP", "source": {"selector": source}, "destination": {"ports": [port]}}
    return _document("GlobalNetworkPolicy", name, selector=selector, ingress=[rule])


def _next_hop(number: int) -> str:
    return format_address((0xAC100001 + number).to_bytes(4, "big"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """User and system time of all its threads, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def memory(pid: int, what: str = "VmRSS") -> int:
    """Bytes."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        super().__init__("dispatcher", timeout=patience)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Dispatcher:
    """The process as it is shipped: SQLite on disk, CURVE, the operators' API."""

    def __init__(self, folder: Path, cores: set[int]) -> None:
        self.folder, self.cores = folder, cores
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        files = {"database": folder / "d.db", "socket": folder / "api", "key_file": folder / "key"}
        settings = {"listen": self.endpoint, **files}
        self.config = folder / "dispatcher.toml"
        self.config.write_text("".join(f'{key} = "{value}"\n' for key, value in settings.items()))
        self.public_key = load_or_create_key(folder / "key").public
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "dispatcher", "run", "--config", str(self.config)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=REPO, stderr=log)
        os.sched_setaffinity(self.process.pid, self.cores)

    def ready(self) -> None:
        """Waits until it serves operators."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.call("GET", "/v1/status")
                return
            assert self.process
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the dispatcher does not serve:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def call(self, method: str, path: str, body: object = None) -> Any:
        connection = UnixConnection(self.folder / "api")
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            found = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {found}")
        return found

    def apply(self, documents: list[dict[str, Any]]) -> int:
        return int(self.call("POST", "/v1/apply", {"documents": documents})["revision"])

    def wait(self, revision: int) -> Mapping[str, Any]:
        """Until all hosts have acknowledged it."""
        found: Mapping[str, Any] = self.call("GET", f"/v1/revisions/{revision}?wait=60")
        if not found["done"]:
            raise RuntimeError(f"revision {revision} is not live: {found['pending'][:5]} ...")
        return found

    def all_in_sync(self, hosts: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while (status := self.call("GET", "/v1/status"))["inSync"] < hosts:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{status['inSync']} of {hosts} hosts are in sync")
            time.sleep(0.005)
