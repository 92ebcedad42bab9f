# Real etcd on loopback, one member or several, with what happens to them: killed, stopped, cut off; and a relay
# that swallows what passes. Every process is this rig's own, on ports of its own, with its data in a test's folder.
from __future__ import annotations

import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dispatcher.store.commits import Commit, Failed, Foreign, Head, Landed, Outcome, Peer, Replaced, Table, Write
from dispatcher.store.etcd.store import EtcdConfig, EtcdStore

MIB = 1 << 20
PATIENCE = 30.0  # seconds until a condition that should hold is given up


def until(holds: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.01)
    return found


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in taken]
    for s in taken:
        s.close()
    return ports


class Relay:
    """Passes TCP on to a port; `swallow` "answers", "requests" or "all": these are read and go nowhere."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.swallow = ""
        self.swallowed = 0
        self.forbidden: set[str] = set()  # members of etcd by their number, whose connections are closed
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._open: list[tuple[str, socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            first = client.recv(65536)
            # A member of etcd says who it is.
            said = re.search(rb"X-Server-From: ([0-9a-f]+)", first)
            source = said[1].decode() if said else ""
            if source in self.forbidden:
                raise OSError("cut")
            target = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        self._open.append((source, client, target))
        threading.Thread(target=self._pass, args=(target, client, "answers", b""), daemon=True).start()
        self._pass(client, target, "requests", first)

    def _pass(self, source: socket.socket, target: socket.socket, what: str, data: bytes) -> None:
        try:
            while data or (data := source.recv(65536)):
                if self.swallow in (what, "all"):
                    self.swallowed += 1
                else:
                    target.sendall(data)
                data = b""
        except OSError:
            pass  # the other direction has closed it
        for end in (source, target):
            _shut(end)

    def cut(self, sources: set[str] | None = None) -> None:
        """Closes what is open: all, or what these members opened."""
        for source, *ends in self._open:
            if sources is None or source in sources:
                for end in ends:
                    _shut(end)

    def heal(self) -> None:
        self.swallow, self.forbidden = "", set()
        self.cut()

    def close(self) -> None:
        _shut(self._server)
        self._server.close()
        self.cut()


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is


@dataclass(frozen=True)
class Tls:
    folder: Path
    usage: str = "serverAuth,clientAuth"  # of the members' certificates
    names: str = "IP:127.0.0.1"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def made(self, name: str, usage: str = "serverAuth,clientAuth", ca: str = "ca") -> tuple[Path, Path]:
        """Certificate and key of `name`, good for loopback."""
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / f"{ca}.pem").exists():
            self._openssl("req -x509 -nodes -days 2 -subj /CN=test-ca", ca, "-out", f"{ca}.pem")
        self._openssl(f"req -nodes -subj /CN={name}", name, "-out", f"{name}.csr")
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={self.names}\nextendedKeyUsage={usage}\n")
        self._run(
            f"openssl x509 -req -in {name}.csr -CA {ca}.pem -CAkey {ca}.key -CAcreateserial -days 2"
            f" -extfile {name}.ext -out {name}.pem"
        )
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _openssl(self, words: str, name: str, *more: str) -> None:
        new = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -keyout"
        self._run(" ".join(["openssl", words, new, f"{name}.key", *more]))

    def _run(self, command: str) -> None:
        subprocess.run(command.split(), cwd=self.folder, check=True, capture_output=True)


class Member:
    def __init__(self, cluster: Etcd, number: int, ports: tuple[int, int]) -> None:
        self.name = f"m{number}"
        self.cluster = cluster
        self.folder = cluster.folder / self.name
        self.client_port, self.peer_port = ports
        self.relay = Relay(self.peer_port)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.cluster.tls else 'http'}://127.0.0.1:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.relay.port}"

    def start(self) -> None:
        mine, cluster = f"http://127.0.0.1:{self.peer_port}", self.cluster
        command = [
            *("etcd", "--name", self.name, "--data-dir", str(self.folder), "--logger", "zap"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", mine, "--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", ",".join(f"{m.name}={m.peer_url}" for m in cluster.members)),
            *cluster.options,
        ]
        with (self.folder.parent / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process
        self.process.wait(10)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Etcd:
    def __init__(self, folder: Path, members: int = 1, tls: Tls | None = None, options: tuple[str, ...] = ()) -> None:
        if shutil.which("etcd") is None or shutil.which("etcdctl") is None:
            pytest.fail("etcd is missing: apt-get install etcd-server etcd-client (make deps does)")
        self.folder, self.tls, self.options = folder, tls, options
        folder.mkdir(parents=True, exist_ok=True)
        if tls is not None:
            tls.made("client")
            certificate, key = tls.made("server", tls.usage)
            self.options += ("--cert-file", str(certificate), "--key-file", str(key))
            self.options += ("--client-cert-auth", "--trusted-ca-file", str(tls.ca))
        ports = free_ports(2 * members)
        self.members: list[Member] = []
        for n in range(members):
            self.members.append(Member(self, n, (ports[2 * n], ports[2 * n + 1])))

    def start(self) -> Etcd:
        for member in self.members:
            member.start()
        self.until_healthy()
        return self

    def until_healthy(self, *members: Member) -> None:
        until(lambda: all(self._run("endpoint", "health", member=m).returncode == 0 for m in members or self.members))

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(m.url for m in self.members)

    def config(self, *endpoints: str, prefix: str = "/slash32/") -> EtcdConfig:
        where = endpoints or self.endpoints
        if self.tls is None:
            return EtcdConfig(where, prefix)
        client = (self.tls.folder / "client.pem", self.tls.folder / "client.key")
        return EtcdConfig(where, prefix, self.tls.ca, *client)

    def ctl(self, *words: str, member: Member | None = None, check: bool = True) -> str:
        run = self._run(*words, member=member)
        assert not check or run.returncode == 0, run.stderr
        return run.stdout if run.returncode == 0 else ""

    def _run(self, *words: str, member: Member | None = None) -> subprocess.CompletedProcess[str]:
        where = member.url if member else ",".join(self.endpoints)
        command = ["etcdctl", "--endpoints", where, *words]
        if self.tls is not None:
            command += ["--cacert", str(self.tls.ca), "--cert", str(self.tls.folder / "client.pem")]
            command += ["--key", str(self.tls.folder / "client.key")]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, env=_ENV)

    def revision(self) -> str:
        """etcd's own."""
        return self.ctl("endpoint", "status", "-w", "fields").split('"Revision" : ')[1].split()[0]

    def restore(self, member: Member, copy: Path) -> None:
        """The only member's data become what a copy has."""
        shutil.rmtree(member.folder)
        words = ("snapshot", "restore", str(copy), "--name", member.name, "--data-dir", str(member.folder))
        cluster = ("--initial-cluster", f"{member.name}={member.peer_url}")
        self.ctl(*words, *cluster, "--initial-advertise-peer-urls", member.peer_url, member=member)

    def keys(self, prefix: str) -> list[str]:
        return self.ctl("get", "--prefix", "--keys-only", prefix).split()

    def _status(self) -> list[list[str]]:
        running = [m for m in self.members if m.runs]
        lines = [self.ctl("endpoint", "status", member=m, check=False) for m in running]
        return [[m.name, *line.split(", ")] for m, line in zip(running, lines, strict=True) if line]

    def leader(self) -> Member:
        def found() -> Member | None:
            names = [status[0] for status in self._status() if status[5] == "true"]
            return next((m for m in self.members if m.name in names), None)

        return until(found)

    def number(self, member: Member) -> str:
        return next(status[2] for status in self._status() if status[0] == member.name)

    def cut_off(self, member: Member) -> None:
        """Its clients still reach it, the other members and it do not reach each other."""
        number = self.number(member)
        for other in self.members:
            if other is member:
                other.relay.forbidden = {self.number(m) for m in self.members if m is not member}
                other.relay.cut()
            else:
                other.relay.forbidden = {number}
                other.relay.cut({number})

    def join(self) -> None:
        for member in self.members:
            member.relay.heal()

    def stop(self) -> None:
        for member in self.members:
            if member.runs:
                member.resume()
                member.kill()
            member.relay.close()


_ENV = {"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin"}


# --- a dispatcher's core, as far as a store sees it ------------------------------------------------------------------


def peer(name: str, size: int = 0) -> tuple[Write, ...]:
    """A commit of one record, which nothing compresses."""
    return (Write(Table.DISPATCHER, (name,), Peer(secrets.token_hex(size // 2), name)),)


class Replica:
    """Applies what its store tells, proposes what it is given, and checks that each commit is the next one."""

    def __init__(self, config: EtcdConfig) -> None:
        self.woken = threading.Event()
        self.store = EtcdStore(config, self.woken.set)
        saved = self.store.load()
        self.epoch, self.revision, self.records = saved.epoch, saved.revision, dict(saved.records)
        self.log: dict[int, tuple[Write, ...]] = {}
        self.outcomes: list[Outcome] = []
        self.proposed: Commit | None = None

    def pump(self, seconds: float = 0.02) -> list[Outcome]:
        self.woken.wait(seconds)
        self.woken.clear()
        found = self.store.take()
        for outcome in found:
            match outcome:
                case Landed(revision):
                    assert self.proposed is not None and self.proposed.revision == revision
                    self._apply(self.proposed)
                case Foreign(commit):
                    self._apply(commit)
                case Replaced(saved):
                    assert saved.epoch == self.epoch and saved.revision > self.revision
                    self.revision, self.records = saved.revision, dict(saved.records)
                case Head(revision):
                    assert revision <= self.revision
        self.outcomes += found
        return found

    def _apply(self, commit: Commit) -> None:
        assert commit.revision == self.revision + 1
        self.revision, self.log[commit.revision] = commit
        for table, key, record in commit.writes:
            if record is None:
                self.records.pop((table, key), None)
            else:
                self.records[table, key] = record

    def propose(self, writes: tuple[Write, ...]) -> Outcome:
        """What becomes of it."""
        self.proposed = commit = Commit(self.revision + 1, writes)
        self.store.propose(commit)
        end = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < end, "a proposal without an outcome"
            for outcome in self.pump():
                if isinstance(outcome, Landed | Failed | Replaced):
                    return outcome
                if isinstance(outcome, Foreign) and outcome.commit.revision == commit.revision:
                    return outcome

    def commit(self, writes: tuple[Write, ...]) -> int:
        """Again and again, as the core does, until it has landed."""
        end = time.monotonic() + PATIENCE
        while not isinstance(outcome := self.propose(writes), Landed):
            assert time.monotonic() < end, outcome
        return outcome.revision

    def head(self) -> int:
        """The revision there is now, and all of it was told."""
        self.store.ask_head()
        answer: Head = self.until(lambda found: next((o for o in found if isinstance(o, Head)), None))
        return answer.revision

    def until(self, holds: Callable[[list[Outcome]], Any]) -> Any:
        """Of what comes from now on."""
        found: list[Outcome] = []

        def come() -> Any:
            found.extend(self.pump())
            return holds(found)

        return until(come)

    def follow(self, revision: int) -> None:
        self.until(lambda _: self.revision >= revision)


def same(*replicas: Replica) -> None:
    revision = replicas[0].head()
    for one in replicas:
        one.follow(revision)
        assert one.revision == revision
        assert one.records == replicas[0].records
        until(lambda one=one: not one.store.trouble)


def contend(replicas: list[Replica], commits: int) -> None:
    """Each wants its own commits in the log, from a thread of its own."""
    failures: list[BaseException] = []

    def work(name: int, one: Replica) -> None:
        try:
            for n in range(commits):
                one.commit(peer(f"{name}-{n}"))
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
