# The inbox with real sockets: whole requests, late answers, and clients that are slow, many, foreign, broken or gone.
from __future__ import annotations

import os
import selectors
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.guests import inbox as module
from hostd.guests.inbox import Inbox, InboxError, Request

UID = os.getuid()
HEADER = b"1\1qemu\1web1\1prepare\1begin\1-\0"


class Bench:
    """An inbox in its loop; `now` is the test's."""

    def __init__(self, path: Path, uid: int = UID) -> None:
        self.path = path
        self.now = 100.0
        self.selector = selectors.DefaultSelector()
        self.inbox = Inbox(path, uid=uid)
        self.inbox.register(self.selector)
        self.clients: list[socket.socket] = []

    def client(self, data: bytes = b"", end: bool = False) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(str(self.path))
        self.clients.append(client)
        client.sendall(data)
        if end:
            client.shutdown(socket.SHUT_WR)
        return client

    def turn(self) -> list[Request]:
        """Handles what is there now."""
        found: list[Request] = []
        while events := self.selector.select(0):
            for key, _ in events:
                assert key.data is self.inbox
                found += self.inbox.ready(key, self.now)
        return found

    def one(self) -> Request:
        (request,) = self.turn()
        return request

    def open_connections(self) -> int:
        return len(self.selector.get_map()) - 1

    def close(self) -> None:
        self.inbox.close()
        assert len(self.selector.get_map()) == 0
        self.selector.close()
        for client in self.clients:
            client.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "run/hook.sock")
    yield made
    made.close()


def everything(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(4096):
        data += part
    return data


def test_a_request_and_its_late_answer(bench: Bench) -> None:
    client = bench.client(HEADER + b"<domain/>", end=True)
    request = bench.one()
    assert (request.driver, request.guest, request.operation) == ("qemu", "web1", "prepare")
    assert (request.suboperation, request.extra, request.xml) == ("begin", "-", b"<domain/>")
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(1)
    client.settimeout(20)
    assert bench.turn() == []
    assert request.answer(1, "no: é")
    assert everything(client) == b"\1no: \xc3\xa9"
    assert not request.answer(0)


def test_answers_in_any_order(bench: Bench) -> None:
    clients = [bench.client(HEADER + str(i).encode(), end=True) for i in range(5)]
    requests = sorted(bench.turn(), key=lambda r: r.xml)
    for i in (3, 0, 4, 1, 2):
        assert requests[i].answer(0, str(i))
    assert [everything(client) for client in clients] == [b"\0%d" % i for i in range(5)]


def test_piecemeal(bench: Bench) -> None:
    client = bench.client()
    for byte in HEADER + b"<a/>":
        client.sendall(bytes([byte]))
        assert bench.turn() == []
    client.shutdown(socket.SHUT_WR)
    assert bench.one().xml == b"<a/>"


def test_binary_xml_is_passed_untouched(bench: Bench) -> None:
    bench.client(HEADER + bytes(range(256)), end=True)
    assert bench.one().xml == bytes(range(256))


def test_header_keeps_odd_bytes(bench: Bench) -> None:
    bench.client("1\1lxc\1wéb 1\1start\1begin\1-\0".encode() + b"", end=True)
    assert bench.one().guest == "wéb 1"
    bench.client(b"1\1lxc\1\xff\1start\1begin\1-\0", end=True)
    assert bench.one().guest == "\udcff"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"x",
        b"2\1qemu\1web1\1prepare\1begin\1-\0<a/>",
        b"1\1qemu\1web1\0",
        HEADER[:-1],
        b"1\1" * 5000 + b"\0",
    ],
)
def test_malformed_is_refused(bench: Bench, data: bytes) -> None:
    client = bench.client(data, end=True)
    assert bench.turn() == []
    assert everything(client).startswith(b"\1the hook speaks another version")
    assert bench.open_connections() == 0


def test_too_large_is_read_to_its_end_and_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    for size, allowed in ((100_000, True), (100_001, False)):
        client = bench.client(HEADER + b"x" * (size - len(HEADER)), end=True)
        requests = bench.turn()
        assert len(requests) == allowed
        for request in requests:
            request.answer(0)
        assert everything(client)[:1] == (b"\0" if allowed else b"\1")


def test_memory_is_let_go_while_too_large(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    bench.client(HEADER + b"x" * 100_000)
    bench.turn()
    assert [len(c.data) for c in bench.inbox._connections] == [0]


def test_half_requests_expire(bench: Bench) -> None:
    client = bench.client(HEADER)
    bench.turn()
    assert bench.inbox.next_expiry() == bench.now + module.PATIENCE
    bench.inbox.expire(bench.now + module.PATIENCE - 0.1)
    assert bench.open_connections() == 1
    bench.inbox.expire(bench.now + module.PATIENCE)
    assert bench.open_connections() == 0 and bench.inbox.next_expiry() is None
    assert everything(client) == b""


def test_unanswered_requests_expire(bench: Bench) -> None:
    client = bench.client(HEADER, end=True)
    request = bench.one()
    bench.inbox.expire(bench.now + module.PATIENCE)
    assert everything(client) == b""
    assert not request.answer(0)


@pytest.mark.parametrize("end", [True, False])
def test_a_client_that_vanishes(bench: Bench, end: bool) -> None:
    client = bench.client(HEADER, end=end)
    client.close()
    for request in bench.turn():
        assert not request.answer(1, "nobody hears this")
    assert bench.open_connections() == 0
    bench.client(HEADER, end=True)
    assert bench.one().answer(0)


def test_a_client_that_is_gone_before_its_answer(bench: Bench) -> None:
    client = bench.client(HEADER, end=True)
    request = bench.one()
    client.close()
    assert not request.answer(0)


def test_only_the_allowed_user(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "hook.sock", uid=UID + 1)
    client = bench.client()
    assert bench.turn() == []
    assert client.recv(1) == b"" and bench.inbox.rejected == 1
    bench.close()


@pytest.mark.skipif(UID != 0, reason="needs root to become another user")
def test_another_user_is_rejected_even_with_an_open_door(bench: Bench) -> None:
    bench.path.chmod(0o666)
    ask = "import socket,sys; s=socket.socket(1); s.connect(sys.argv[1]); s.shutdown(1); sys.exit(s.recv(9) != b'')"
    command = ["/usr/bin/python3", "-c", ask, bench.path.name]
    for user, code in ((65534, 0), (0, 1)):
        child = subprocess.Popen(command, cwd=bench.path.parent, user=user)
        deadline = time.monotonic() + 30
        while child.poll() is None and time.monotonic() < deadline:
            for key, _ in bench.selector.select(0.05):
                for request in bench.inbox.ready(key, bench.now):
                    request.answer(0)
        assert child.wait(1) == code
    assert bench.inbox.rejected == 1


def test_many_wait_in_the_backlog(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 3)
    clients = [bench.client(HEADER, end=True) for _ in range(10)]
    served = 0
    while requests := bench.turn():
        assert len(requests) <= 3
        served += len(requests)
        for request in requests:
            request.answer(0)
    assert served == 10 and all(everything(client) == b"\0" for client in clients)


def test_no_descriptors_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        def __init__(self, real: socket.socket) -> None:
            self.real, self.left = real, 1

        def accept(self) -> tuple[socket.socket, object]:
            if self.left:
                self.left -= 1
                raise OSError(24, "Too many open files")
            return self.real.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    bench.client(HEADER, end=True)
    real = bench.inbox._listener
    monkeypatch.setattr(bench.inbox, "_listener", Exhausted(real))
    bench.inbox._accept(bench.now)
    monkeypatch.setattr(bench.inbox, "_listener", real)
    with pytest.raises(KeyError):
        bench.selector.get_key(real)
    assert bench.turn() == [], "no busy loop: the listener is left alone"
    bench.inbox.expire(bench.now)
    assert bench.one().answer(0)


def test_socket_file_is_private_and_appears_complete(bench: Bench) -> None:
    found = bench.path.stat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_IMODE(bench.path.parent.stat().st_mode) & 0o022 == 0
    assert [path.name for path in bench.path.parent.iterdir()] == ["hook.sock"]


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "hook.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    bench = Bench(path)
    bench.client(HEADER, end=True)
    assert bench.one().answer(0)
    bench.close()
    assert not path.exists()


def test_a_living_one_is_not(bench: Bench) -> None:
    with pytest.raises(InboxError, match="another slash32-hostd"):
        Inbox(bench.path, uid=UID)
    bench.client(HEADER, end=True)
    assert len(bench.turn()) == 1


def test_a_successors_socket_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "hook.sock")
    bench.path.unlink()
    other = Bench(bench.path)
    bench.close()
    assert other.path.exists()
    other.close()
    assert not other.path.exists()


def test_directory_of_others_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for directory in (open_to_all, tmp_path / "link", tmp_path / "none/deeper", Path("/dev/null")):
        with pytest.raises(InboxError) as caught:
            Inbox(directory / "hook.sock", uid=UID)
        assert str(caught.value).isprintable()


def test_the_real_hook(bench: Bench) -> None:
    """The shipped script, whole, against the shipped inbox."""
    repo = Path(__file__).resolve().parents[3]
    text = (repo / "hooks/hook.py").read_text().replace('"/run/slash32/hook.sock"', repr(str(bench.path)))
    script = bench.path.parent.parent / "hooks/lxc.d/50-slash32"
    script.parent.mkdir(parents=True)
    script.write_text(text)
    script.chmod(0o755)
    argv = [str(script), "web1", "start", "begin", "-"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin and child.stdout and child.stderr
        child.stdin.write(b"<domain/>")
        child.stdin.close()
        requests: list[Request] = []
        deadline = time.monotonic() + 30
        while not requests and time.monotonic() < deadline:
            for key, _ in bench.selector.select(1):
                requests += bench.inbox.ready(key, bench.now)
        (request,) = requests
        assert (request.driver, request.guest, request.operation, request.xml) == ("lxc", "web1", "start", b"<domain/>")
        request.answer(1, "domain 'web1': no")
        assert (child.wait(30), child.stdout.read()) == (1, b"")
        assert child.stderr.read() == b"slash32: domain 'web1': no\n"
