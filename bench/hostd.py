# Measures: the real daemon (`slash32-hostd run`, Debian's python3), started from its state on disk in a namespace whose
# kernel holds what it should: memory with 100 endpoints against the bare imports of its dependencies (bar 3: +6 MiB);
# with 1,000, the time from the end of its imports to READY against a raw netlink dump plus compare (bar 6: at most 3
# times), the whole start against interpreter plus imports (at most 1.5 times), and that it wrote nothing.
#   python -m bench.hostd [--json] [-n N] [--few 100] [--many 1000]
from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure import Case, Report, Stats, collect, stats
from bench.rig import NOBODY, Host, Recording, raw_sockets, world
from hostd.compiler.world import World
from hostd.dataplane.host import boot_id
from hostd.journal import Journal
from hostd.memory import Memory
from hostd.reporting.report import bring_up_to_date
from slash32.pack import MASK, Kind, digest_of
from slash32.sync import Applied
from slash32.wire import Put, Snapshot

REPO = Path(__file__).resolve().parents[1]
DEBIAN = ["/usr/bin/python3", "-I", "-c"]
RUN = """import sys
sys.path.insert(0, sys.argv.pop(1))
from hostd.__main__ import main
import hostd.daemon
from slash32.notify import notify
notify("IMPORTED=1")
sys.exit(main())
"""
MODULES = """import sys
sys.path.insert(0, sys.argv.pop(1))
import hostd.__main__, hostd.daemon
ours = ("hostd", "slash32", "__main__")
found = {name: getattr(module, "__spec__", None) for name, module in sys.modules.items()}
print(*(name for name, spec in found.items() if spec and name.split(".")[0] not in ours))
"""
IMPORTS = """import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
"""
THIRD = ["zmq", "msgpack", "lxml.etree", "libvirt"]
PATIENCE = 60.0  # seconds
SETTLED = 3.0  # seconds until what a start left behind is counted
ALLOWED = 6 << 20


class Start(NamedTuple):
    """Seconds since the spawn."""

    imported: float
    ready: float


class Site:
    """A host with so many endpoints in the kernel, and the daemon's files that say so."""

    def __init__(self, present: int, directory: Path) -> None:
        self.host = Host(present, world(present))
        self.state, self.run = directory / "state", directory / "run"
        self.run.mkdir()
        self._remember()
        self.config = directory / "hostd.toml"
        self.config.write_text(
            f'host = "h1"\ndispatcher = "tcp://127.0.0.1:{NOBODY}"\ndispatcher_key = "{"x" * 40}"\n'
            f'libvirt = ["test:///default"]\nstate_dir = "{self.state}"\nrun_dir = "{self.run}"\n'
        )
        self.bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bell.bind(str(directory / "notify"))
        self.environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(directory / "notify")}
        self.daemon: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"

    def _remember(self) -> None:
        memory = Memory(Journal(self.state / "hostd.state"), boot_id())
        memory.recall()
        puts = tuple(_puts(self.host.world))
        digest = sum(digest_of(*put) for put in puts) & MASK
        (applied,) = memory.replica.receive(Snapshot("bench", 1, digest, False, puts))
        assert isinstance(applied, Applied)
        for one in self.host.locals:
            memory.locals.put(one)
        memory.applied([applied])
        memory.close()

    def start(self) -> Start:
        self.host.namespace.enter()
        began = time.monotonic()
        argv = [*DEBIAN, RUN, str(REPO), "--config", str(self.config), "run"]
        with self.log.open("wb") as log:
            self.daemon = subprocess.Popen(argv, env=self.environment, stdout=log, stderr=log)
        imported = self._hear(b"IMPORTED=1")
        return Start(imported - began, self._hear(b"READY=1") - began)

    def _hear(self, word: bytes) -> float:
        self.bell.settimeout(PATIENCE)
        try:
            while self.bell.recv(4096) != word:
                pass
        except TimeoutError:
            raise RuntimeError(f"hostd did not say {word.decode()}: {self.log.read_text().strip()[-300:]}") from None
        return time.monotonic()

    def stop(self) -> None:
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(PATIENCE)
            self.daemon = None
        self.bell.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.bell.recv(4096):
                pass

    def status(self) -> dict[str, Any]:
        """The running daemon's word of now."""
        assert self.daemon is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            bring_up_to_date(self.run / "hook.sock")
            with contextlib.suppress(FileNotFoundError):
                found: dict[str, Any] = json.loads((self.run / "hostd.status").read_text())
                if found["pid"] == self.daemon.pid:
                    return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"hostd writes no status: {self.log.read_text().strip()[-300:]}")
            time.sleep(0.005)

    def writes(self) -> int:
        """Since the start."""
        said = self.status()
        if said["failures"]:
            raise RuntimeError(f"hostd: {said['failures']}")
        return int(said["counters"]["writes"])


def _puts(given: World) -> list[Put]:
    return [
        *(Put(Kind.POLICY, name, policy) for name, policy in given.policies.items()),
        *(Put(Kind.SET, name, value) for name, value in given.sets.items()),
        *(Put(Kind.TIER, name, tier) for name, tier in given.tiers.items()),
        *(Put(Kind.STAGED, name, policy) for name, policy in given.staged.items()),
    ]


def rss(pid: int) -> float:
    return 1024.0 * int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def dependencies() -> list[str]:
    """All modules that it loads and that are not its own."""
    return _output(MODULES, str(REPO)).split()


def bare(modules: list[str]) -> float:
    return 1024.0 * int(_output(IMPORTS, *modules))


def _output(code: str, *arguments: str) -> str:
    return subprocess.run([*DEBIAN, code, *arguments], capture_output=True, check=True, text=True).stdout


def memory(site: Site, n: int) -> dict[str, Stats]:
    found: dict[str, list[float]] = {"hostd": [], "bare imports": [], "bare imports, third parties' only": []}
    modules = dependencies()
    for _ in range(n):
        found["bare imports"].append(bare(modules))
        found["bare imports, third parties' only"].append(bare(THIRD))
        site.start()
        time.sleep(SETTLED)
        assert site.daemon is not None
        found["hostd"].append(rss(site.daemon.pid))
        site.stop()
    return {name: stats(values) for name, values in found.items()}


class Floor:
    """Every dump that a resync needs, each once, read raw and compared, element by element, with what was before."""

    def __init__(self, site: Site) -> None:
        recording = Recording()
        with recording.taken():
            site.host.settler.resync()
        self.requests = recording.dumps()
        self.sockets = raw_sockets()
        self.expected = self.read()

    def read(self) -> list[set[bytes]]:
        return [_dumped(self.sockets[protocol], request) for protocol, request in self.requests]

    def compare(self) -> None:
        if self.read() != self.expected:
            raise RuntimeError("the floor: the kernel changed")


_ELEMENTS = 0x0A0C
# What of a link (up to its group), an address and a neighbour is neither clock nor counter, by message kind and family.
_STEADY = {(16, 0): 100, (20, 10): 28, (28, 2): 32, (28, 10): 44}
_PERMANENT = 0x80
_OURS = b"\x05\0\x0b\0\x84"  # an address's protocol


def _dumped(s: socket.socket, request: bytes) -> set[bytes]:
    s.send(request)
    found: set[bytes] = set()
    while True:
        data = s.recv(1 << 18)
        offset, end = 0, len(data)
        while offset < end:
            length = int.from_bytes(data[offset : offset + 4], "little")
            kind = int.from_bytes(data[offset + 4 : offset + 6], "little")
            if kind == 3:
                return found
            body = data[offset + 16 : offset + length]
            if kind == _ELEMENTS:
                found.update(_elements(body))
            elif (kind != 20 or _OURS in body) and (kind != 28 or body[8] == _PERMANENT):
                found.add(body[: _STEADY.get((kind, body[0]))])
            offset += (length + 3) & ~3


def _elements(body: bytes) -> list[bytes]:
    """Table, set, then the list: of elements that are all of one length here."""
    offset = 4
    while int.from_bytes(body[offset + 2 : offset + 4], "little") & 0x3FFF != 3:
        offset += (int.from_bytes(body[offset : offset + 2], "little") + 3) & ~3
    step = (int.from_bytes(body[offset + 4 : offset + 6], "little") + 3) & ~3
    return [body[at : at + step] for at in range(offset + 4, len(body), step)] if step else []


def restarts(site: Site, n: int) -> tuple[dict[str, list[float]], int]:
    floor = Floor(site)
    found: dict[str, list[float]] = {"imports to READY": [], "spawn to READY": [], "interpreter and imports": []}
    written = 0

    def restart() -> None:
        nonlocal written
        imported, ready = site.start()
        found["imports to READY"].append(ready - imported)
        found["spawn to READY"].append(ready)
        found["interpreter and imports"].append(imported)
        written += site.writes()

    cases: dict[str, Callable[[], object] | Case] = {
        "restart": Case(restart, after=site.stop),
        "raw dump and compare": Case(floor.compare, before=site.host.namespace.enter),
    }
    seconds = collect(cases, n)
    return found | {"raw dump and compare": seconds["raw dump and compare"]}, written


def run(n: int, few: int, many: int, json: bool) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "few", Path(temporary) / "many"
        for directory in (small, large):
            directory.mkdir()
        measured = memory(Site(few, small), max(1, n // 5))
        seconds, written = restarts(Site(many, large), n)
    over = {
        f"hostd beyond {name} / 6 MiB": (measured["hostd"].median - found.median) / ALLOWED
        for name, found in measured.items()
        if name != "hostd"
    }
    bar = {"hostd beyond bare imports / 6 MiB": 1.0}
    held = Report(f"memory with {few} endpoints", measured, over, bar, "bytes").tell(json)
    times = {name: stats(found) for name, found in seconds.items()}
    bars = {
        "imports to READY / raw dump and compare": 3.0,
        "spawn to READY / interpreter and imports": 1.5,
        "operations written": 0.0,
    }
    ratios = {name: times[one].median / times[two].median for name in bars if " / " in name
              for one, two in (name.split(" / "),)}  # fmt: skip
    ratios["operations written"] = float(written)
    return Report(f"restart with {many} endpoints", times, ratios, bars).tell(json) and held


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.hostd")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=50)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--many", type=int, default=1000)
    given = parser.parse_args()
    return 0 if run(given.n, given.few, given.many, given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
