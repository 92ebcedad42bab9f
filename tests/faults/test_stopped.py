# A real hostd, with a real kernel, that is stopped (SIGSTOP) while others change what concerns it: it costs the
# dispatcher its state and not their number, nobody else waits for it, and then it has the state, in its kernel too.
from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dispatcher_rig import FakeHost, Rack, guest, memory_kib, policy, until
from netns import Namespace
from proxy import Proxy
from real_host import RealHost

from slash32.model import Endpoint
from slash32.pack import Kind
from slash32.sync import Replica

FULL = os.environ.get("SLASH32_COUNTS") == "full"
CHANGES = 100_000 if FULL else 10_000
ASLEEP = 60.0 if FULL else 3.0  # seconds, at least
BATCH = 100
GUESTS = 3000  # that come and go
WEB, APP = 'role == "web"', 'role == "app"'

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@pytest.fixture
def here() -> Iterator[Namespace]:
    """Where the dispatcher is; the test runs inside."""
    namespace = Namespace()
    with namespace.entered():
        yield namespace
    namespace.close()


@pytest.fixture
def real(here: Namespace, rack: Rack, tmp_path: Path) -> Iterator[tuple[RealHost, Proxy]]:
    """h1, known to the rack's dispatcher, behind a proxy that only counts."""
    folder = tmp_path / "h1"
    folder.mkdir()
    host, proxy = RealHost(folder, here), Proxy(rack.dispatcher.port, 1, bind="0.0.0.0")
    yield host, proxy
    host.stop()
    proxy.close()


class Load:
    """Others' guests come and go, all of which h1's web guest may be spoken to by."""

    def __init__(self, rack: Rack) -> None:
        self.rack, self.number, self.changes = rack, 0, 0

    def batch(self) -> None:
        """All granted when it returns."""
        host = self.rack.hosts[self.number % len(self.rack.hosts)]
        last = 0
        for _ in range(BATCH // 2):
            self.number += 1
            one = _guest(1000 + self.number % GUESTS)
            last = host.release(one.key) if one.key in host.claims else host.claim(one)
            self.changes += 1
        until(lambda: last in host.answered, self.rack.hosts)
        host.events.clear()
        host.answered.clear()

    def latencies(self, count: int) -> list[float]:
        """From a change until it is with every fake host."""
        found = []
        for _ in range(count):
            began = time.monotonic()
            revision = self.rack.dispatcher.apply(policy("moving", WEB, f'n == "{self.number}" || {APP}'))
            self.number += 1
            until(lambda want=revision: all(h.replica.revision >= want for h in self.rack.hosts), self.rack.hosts)
            found.append(time.monotonic() - began)
        return found


def _guest(number: int) -> Endpoint:
    return guest(number, "web", f"10.70.{number >> 8}.{number & 255}")


def p99(found: list[float]) -> float:
    return sorted(found)[len(found) * 99 // 100]


def test_it_sleeps_and_has_the_state(rack: Rack, real: tuple[RealHost, Proxy]) -> None:
    h1, proxy = real
    others = rack.begin(3)
    others[0].stop()  # h1 is a real one
    rack.hosts = others[1:]
    shutil.copy(others[0].key_file, h1.state / "hostd.key")
    h1.configure(proxy.port, rack.dispatcher.public_key)
    rack.dispatcher.apply(policy("web-to-web", WEB, WEB), policy("moving", WEB, APP))
    for number, host in enumerate(rack.hosts, 2):
        host.claim(guest(number))
    h1.start()
    until(lambda: h1.status()["in_sync"], rack.hosts)
    load = Load(rack)
    while load.number < GUESTS:  # all there: from now on it is no more state, only more changes
        load.batch()
    assert rack.dispatcher.process
    pid = rack.dispatcher.process.pid
    awake, memory = load.latencies(100), memory_kib(pid)
    h1.signal(signal.SIGSTOP)
    began, asleep, most = time.monotonic(), list[float](), memory
    while load.changes < CHANGES or time.monotonic() - began < ASLEEP:
        load.batch()
        if load.number % (10 * BATCH) < BATCH:
            asleep += load.latencies(10)
            most = max(most, memory_kib(pid))
    revision = rack.dispatcher.get("/v1/status")["revision"]
    assert h1.status()["revision"] < revision, "the control: it heard nothing of that"
    went = proxy.passed
    h1.signal(signal.SIGCONT)
    rack.until(lambda: rack.dispatcher.get(f"/v1/revisions/{revision}")["done"])  # acknowledged: from its kernel
    caught_up = proxy.passed - went
    print(f"{load.changes} changes in {time.monotonic() - began:.0f} s: dispatcher {memory} KiB, at most {most}; "
          f"others' p99 {p99(awake) * 1e3:.1f} ms before, {p99(asleep) * 1e3:.1f} ms meanwhile")  # fmt: skip
    rack.settle()
    done = h1.said("diff")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    _diff_can_fail(h1)
    h1.stop()
    whole = _what_a_fresh_host_gets(rack, h1, others[0], proxy)
    print(f"{caught_up} bytes to catch up, {whole} for a host that knows nothing")
    assert caught_up < 3 * whole + (64 << 10), "state, not history"
    assert most < 1.5 * memory
    assert p99(asleep) < 5 * p99(awake) + 0.05


def _diff_can_fail(h1: RealHost) -> None:
    h1.signal(signal.SIGSTOP)
    address = str(next(iter(h1.replica().objects(Kind.ROUTE))))
    h1.inside("ip", "route", "del", address)
    assert h1.said("diff").returncode == 1
    h1.signal(signal.SIGCONT)


def _what_a_fresh_host_gets(rack: Rack, h1: RealHost, fake: FakeHost, proxy: Proxy) -> int:
    """In bytes; its content is what the real one has on disk."""
    fake.replica = Replica()
    fake.claims = {one.endpoint.key: one.endpoint for one in h1.kernel.locals}
    fake.places = (fake.places[0]._replace(endpoint=f"tcp://127.0.0.1:{proxy.port}"),)
    before = proxy.passed
    fake.start()
    rack.hosts.append(fake)
    rack.until(lambda: fake.in_sync)
    assert fake.replica.digest == h1.replica().digest and fake.objects(Kind.SET)
    return proxy.passed - before
