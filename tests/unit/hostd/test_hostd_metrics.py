# What hostd measures: everything declared is exported and true; and how it is asked, by anybody, without being held up.
from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from hostd.change.settle import Refused
from hostd.compiler.desired import Dirty
from hostd.reporting import metrics, scrape
from hostd.reporting.metrics import Measured, Present, Timed
from hostd.reporting.scrape import Page, Scrape
from slash32.process import usage
from tests.exposition import Samples, faults, parsed, value
from tests.unit.hostd.agent_rig import Guest, Request, Rig

PRESENT = Present("nftables", {"qemu": True, "lxc": False}, [], 0, 0, "")


def exported(rig: Rig, measured: Measured | None = None, present: Present = PRESENT) -> Samples:
    text = metrics.exposition(rig.agent, measured or Measured(), present, usage())
    assert faults(text, metrics.FAMILIES) == []
    return parsed(text)


def test_a_host_at_rest(rig: Rig) -> None:
    found = exported(rig)
    assert value(found, "slash32_hostd_in_sync") == value(found, "slash32_hostd_connected") == 1
    assert value(found, "slash32_hostd_revision") == rig.scene.revision
    assert value(found, "slash32_hostd_packet_filter_info", packet_filter="nftables") == 1
    assert value(found, "slash32_hostd_libvirt_connected", driver="lxc") == 0
    assert value(found, "slash32_hostd_problems") == 0
    assert metrics.health(rig.agent, PRESENT) == {"status": "ok", "problems": []}


def test_endpoints_are_counted_by_what_becomes_of_them(rig: Rig) -> None:
    before = value(exported(rig), "slash32_hostd_kernel_operations_total")
    rig.start(Guest(1))
    rig.start(Guest(2), grant=False)
    rig.hook(Guest(3), "migrate")
    rig.hook(Guest(4), "prepare")
    found = exported(rig)
    states = {state: value(found, "slash32_hostd_endpoints", state=state) for state in metrics.STATES}
    assert {state: n for state, n in states.items() if n} == {
        "connected": 1, "isolated": 1, "incoming": 1, "reserved": 1,
    }  # fmt: skip
    assert value(found, "slash32_hostd_kernel_operations_total") > before
    assert value(found, "slash32_hostd_kernel_apply_duration_seconds_count") > 0


def test_what_is_wrong_is_said(rig: Rig) -> None:
    rig.lose()
    rig.feed.trouble = "the connection\nis lost"
    problem = "no dispatcher: the connection\\nis lost"
    assert metrics.health(rig.agent, PRESENT) == {"status": "degraded", "problems": [problem]}
    assert value(exported(rig), "slash32_hostd_problems") == 1
    assert value(exported(rig), "slash32_hostd_connected") == 0
    rig.connect()
    assert metrics.health(rig.agent, PRESENT)["status"] == "ok"
    rig.agent.held = "the dispatcher is older"
    assert metrics.health(rig.agent, PRESENT)["problems"] == ["held: the dispatcher is older"]
    assert value(exported(rig), "slash32_hostd_held") == 1
    rig.agent.held = ""
    blind = Present("nftables", {"qemu": False}, [], 0, 0, "no space left")
    assert [line.partition(":")[0] for line in metrics.health(rig.agent, blind)["problems"]] == [
        "disk", "libvirt does not answer",
    ]  # fmt: skip


def test_what_the_kernel_refuses_is_said(rig: Rig) -> None:
    for n in range(30):
        rig.settler.refused[f"tap vnet{n}"] = Refused(f"tap vnet{n}", "no\n" * 1000, Dirty())
    problems = metrics.health(rig.agent, PRESENT)["problems"]
    assert len(problems) == 21 and problems[-1] == "and 10 more"
    assert all(len(line) < 400 and line.isprintable() for line in problems)
    assert value(exported(rig), "slash32_hostd_kernel_failures") == 30


def test_hooks_are_timed(rig: Rig) -> None:
    measured, now = Measured(), 10.0

    def clock() -> float:
        return now

    def ask(operation: str) -> Timed:
        return Timed(Request("qemu", operation, "begin", b""), measured, clock)

    ask("prepare").answer(0)
    now, waiting = 10.0, ask("prepare")
    now = 12.0
    waiting.answer(1, "no")
    gone = ask("stopped")
    gone._request.answer = lambda code, message="": False  # type: ignore[method-assign,misc]
    gone.answer(0)
    ask("x" * 50).answer(0)
    found = exported(rig, measured)
    assert value(found, "slash32_hostd_hook_answers_total", operation="prepare", result="allowed") == 1
    assert value(found, "slash32_hostd_hook_answers_total", operation="prepare", result="refused") == 1
    assert value(found, "slash32_hostd_hook_answers_total", operation="stopped", result="gone") == 1
    assert value(found, "slash32_hostd_hook_answers_total", operation="other", result="allowed") == 1
    assert value(found, "slash32_hostd_hook_duration_seconds_sum", operation="prepare") == 2.0


def test_what_others_counted(rig: Rig) -> None:
    measured = Measured(claims_refused=3)
    measured.scanned("qemu", 0.02)
    staged = [{"policy": "web", "packets": 2}, {"policy": "web", "packets": 3}, {"policy": "db", "packets": 0}]
    found = exported(rig, measured, Present("iptables", {"qemu": True}, staged, 12, 4, ""))
    assert value(found, "slash32_hostd_staged_drops_total", policy="web") == 5
    assert value(found, "slash32_hostd_staged_drops_total", policy="db") == 0
    assert value(found, "slash32_hostd_logged_packets_total") == 12
    assert value(found, "slash32_hostd_logged_packets_lost_total") == 4
    assert value(found, "slash32_hostd_claims_refused_total") == 3
    assert value(found, "slash32_hostd_libvirt_scan_duration_seconds_bucket", driver="qemu", le="0.025") == 1


# --- how it is asked -------------------------------------------------------------------------------------------------


class Site:
    """A Scrape in a loop as hostd's, that is turned by hand."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.now = 100.0
        self.selector = selectors.DefaultSelector()
        self.scrape = Scrape(("127.0.0.1", 0), self.page)
        self.scrape.register(self.selector, self.now)
        self.body = "slash32_x 1\n"

    def page(self, path: str) -> Page | None:
        self.made.append(path)
        return Page(200, "text/plain; version=0.0.4", self.body) if path == "/metrics" else None

    def turn(self) -> int:
        ready = self.selector.select(0.01)
        for key, _ in ready:
            key.data(self.now)
        return len(ready)

    def turns(self, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not until():
            self.turn()
            assert time.monotonic() < deadline

    def client(self) -> socket.socket:
        assert self.scrape.address
        made = socket.create_connection(self.scrape.address, timeout=10)
        made.setblocking(False)
        return made

    def hear(self, client: socket.socket) -> bytes:
        """All of it, until the end."""
        heard = bytearray()

        def ended() -> bool:
            try:
                part = client.recv(1 << 16)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            heard.extend(part)
            return not part

        self.turns(ended)
        client.close()
        return bytes(heard)

    def ask(self, request: bytes) -> tuple[int, bytes]:
        client = self.client()
        client.send(request)
        head, _, body = self.hear(client).partition(b"\r\n\r\n")
        return int(head.split()[1]), body


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.scrape.close()
    assert not made.selector.get_map(), "nothing is left"
    made.selector.close()


def test_a_page_is_had(site: Site) -> None:
    assert site.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") == (200, b"slash32_x 1\n")
    assert site.ask(b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n") == (200, b"")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../health HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + b"x" * scrape.MAX_REQUEST, 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 200),
    ],
)
def test_what_else_is_said(site: Site, request_: bytes, status: int) -> None:
    assert site.ask(request_)[0] == status


def test_pages_are_made_a_few_times_a_second(site: Site) -> None:
    for _ in range(5):
        site.ask(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert site.made == ["/metrics"]
    site.now += scrape.FRESH
    site.ask(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert site.made == ["/metrics"] * 2
    for n in range(50):
        site.ask(f"GET /{n} HTTP/1.1\r\n\r\n".encode())
    assert set(site.scrape._fresh) == {"/metrics"}


def test_who_says_nothing_holds_nothing_up(site: Site) -> None:
    silent = [site.client() for _ in range(scrape.MAX_CONNECTIONS)]
    site.turns(lambda: len(site.scrape._connections) == scrape.MAX_CONNECTIONS)
    late = site.client()
    late.send(b"GET /metrics HTTP/1.1\r\n\r\n")
    for _ in range(10):
        site.turn()
    assert len(site.scrape._connections) == scrape.MAX_CONNECTIONS and site.made == []
    assert site.turn() == 0, "and the loop sleeps"
    site.now += scrape.PATIENCE
    site.scrape.tick(site.now)
    assert b"slash32_x 1" in site.hear(late), "the control: it is served when they are gone"
    for each in silent:
        each.close()


def test_who_does_not_listen_holds_nothing_up(site: Site) -> None:
    site.body = "x" * (12 << 20)
    client = site.client()
    client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
    site.turns(lambda: site.made)
    site.turns(lambda: site.turn() == 0)
    assert len(site.scrape._connections) == 1, "the rest waits for the client"
    site.body, site.now = "y", site.now + 1
    assert site.ask(b"GET /metrics HTTP/1.1\r\n\r\n") == (200, b"y"), "others are served"
    assert len(site.hear(client)) > 12 << 20, "and so is the first, when it listens"


def test_a_client_that_goes_away(site: Site) -> None:
    for said in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
        client = site.client()
        client.send(said)
        client.close()
        site.turns(lambda: not site.turn() and not site.scrape._connections)
    assert site.ask(b"GET /metrics HTTP/1.1\r\n\r\n")[0] == 200, "the control"


def test_an_address_that_is_taken_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        where = other.getsockname()
        selector = selectors.DefaultSelector()
        made = Scrape(where, lambda _: None)
        made.register(selector, 0.0)
        made.tick(scrape.AGAIN)
        assert made.address is None and len(caplog.messages) == 1
    made.tick(scrape.AGAIN + 1)
    assert made.address is None, "not yet"
    made.tick(2 * scrape.AGAIN)
    assert made.address == where
    made.close()
