# `slash32 watch` and `audit`: events as they come, over lost connections; hostile words stay on their line.
from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slash32.cli import events
from slash32.cli.client import CallError, Client
from slash32.cli.events import Event, parse
from tests.unit.cli.canned import Dispatcher, Run, on_a_socket, runs

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
POLICY = {"kind": "GlobalNetworkPolicy", "name": "web", "change": "put", "object": {"spec": {}}}
EVIL = {"kind": "Endpoint", "name": "u/52:54", "change": "deleted", "object": {"domain": "e\x1b[31m\nvil\x9b"}}


def event(revision: int, *changes: dict[str, Any]) -> bytes:
    data = json.dumps({"revision": revision, "changes": changes})
    return f"event: commit\nid: {revision}\ndata: {data}\n\n".encode()


def lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def test_events_are_read_as_the_standard_says() -> None:
    text = (
        b": hello\n\nid: 7\nevent: commit\ndata: a\ndata:b\ndata:  c\nretry: 5\nodd\n\n:\n\ndata: d\r\n\r\nevent: x\n\n"
    )
    assert [*parse(lines(text))] == [Event("7", "commit", "a\nb\n c"), Event("7", "message", "d")]
    assert [*parse(lines(b"data: cut off\n"))] == [*parse(lines(b"data: cut off"))] == []
    assert [*parse(lines(b"id: 1\n\ndata: \xff\n\n"))] == [Event("1", "message", "\ufffd")]


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"") + b"\n")))
def test_any_bytes_are_events_or_none(text: list[bytes]) -> None:
    for found in parse(text):
        assert "\0" not in found.id and found.name


def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LINE_LIMIT", 100)
    with pytest.raises(CallError, match="no dispatcher"):
        [*parse([b"data: " + b"x" * 94])]
    assert [*parse([b"data: " + b"x" * 90 + b"\n", b"\n"])], "the control"


class Stream:
    """Each connection gets the next of what is prepared, and what it asked is kept."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        self.asked: list[str] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self._serve, args=answers, daemon=True)
        self.thread.start()

    def _serve(self, *answers: bytes) -> None:
        for answer in answers:
            connection, _ = self.listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"\r\n\r\n"):
                    asked += connection.recv(1 << 16)
                self.asked.append(asked.decode())
                connection.sendall(answer)

    def close(self) -> None:
        self.thread.join(10)
        self.listener.close()


STATUS = b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"revision":6}'
GONE = b'HTTP/1.1 410 Gone\r\nContent-Length: 20\r\n\r\n{"errors":["gone!"]}'
BUSY = b'HTTP/1.1 503 Busy\r\nContent-Length: 20\r\n\r\n{"errors":["later"]}'


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setattr(events, "AGAIN", 0.001)
    monkeypatch.setenv("SLASH32_SOCKET", str(tmp_path / "api.sock"))
    return runs(capsys)


def watch(run: Run, tmp_path: Path, words: list[str], *answers: bytes) -> tuple[list[str], list[str], list[str]]:
    """Lines of stdout and of stderr, and first lines and last ids of what was asked."""
    stream = Stream(tmp_path / "api.sock", *answers)
    code, out, err = run("watch", *words)
    stream.close()
    assert code == 1
    wanted = [[a for a in asked.splitlines() if a.startswith(("GET", "Last-Event-ID"))] for asked in stream.asked]
    return out.splitlines(), err.splitlines(), [" ".join(asked) for asked in wanted]


def test_watch_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    first = HEAD + b"\r\n: here\n\n" + event(7, POLICY) + event(8, EVIL, POLICY)[:-5]
    out, err, asked = watch(run, tmp_path, [], STATUS, first, BUSY, HEAD + b"\r\n" + event(8, EVIL, POLICY), GONE)
    assert out == [
        "7         GlobalNetworkPolicy web put",
        r"8         Endpoint u/52:54 (e\x1b[31m\nvil\x9b) deleted",
        "8         GlobalNetworkPolicy web put",
    ]
    where = f'the dispatcher at "{tmp_path}/api.sock"'
    assert err == [f"{where}: it ended; it is asked again"] * 2 + ["gone!"]
    watching = "GET /v1/watch?since=6 HTTP/1.1"
    again = "GET /v1/watch HTTP/1.1 Last-Event-ID: {}"
    assert asked == ["GET /v1/status HTTP/1.1", watching, again.format(7), again.format(7), again.format(8)]


def test_watch_of_some_kinds_as_json(run: Run, tmp_path: Path) -> None:
    chunk = event(7, POLICY) + event(8, EVIL, POLICY) + b'event: reset\nid: 90\ndata: {"revision": 90}\n\n'
    content = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(chunk), chunk)
    out, _, asked = watch(run, tmp_path, ["ep", "-o", "json", "--since", "5"], HEAD + content, GONE)
    assert [json.loads(line) for line in out] == [
        {"revision": 8, "changes": [EVIL]},
        {"revision": 90, "reset": True},
    ]
    assert all(line.isprintable() for line in out)
    assert asked == ["GET /v1/watch?since=5 HTTP/1.1", "GET /v1/watch HTTP/1.1 Last-Event-ID: 90"]


def test_watch_says_that_something_was_missed(run: Run, tmp_path: Path) -> None:
    reset = b'event: reset\nid: 90\ndata: {"revision": 90}\n\nevent: news\ndata: x\n\n'
    out, _, _ = watch(run, tmp_path, ["--since", "5"], HEAD + b"\r\n" + reset, GONE)
    assert out == ["reset     to revision 90: what changed before it is not known any more"]


@pytest.mark.parametrize("answer", [GONE, BUSY, HEAD + b"\r\nevent: commit\ndata: [1]\n\n", b"SSH-2.0\r\n", b""])
def test_what_cannot_be_watched_is_one_line(run: Run, tmp_path: Path, answer: bytes) -> None:
    out, err, _ = watch(run, tmp_path, ["--since", "5"], answer)
    assert out == [] and len(err) == 1 and "a bug" not in err[0]


def test_silence_is_noticed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SILENCE", 0.05)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "x.sock"))
    listener.listen()
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        listener.close()
        raise KeyboardInterrupt

    held: list[socket.socket] = []

    def serve() -> None:
        held.append(listener.accept()[0])
        held[0].sendall(HEAD + b"\r\n: here\n")

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        next(events.follow(Client(str(tmp_path / "x.sock")), 5, tell))
    thread.join()
    held[0].close()
    assert told[0].endswith("no word for 0 s; it is asked again")


# --- audit -----------------------------------------------------------------------------------------------------------

ENTRY = {
    "revision": 8,
    "at": "2026-11-23T18:47:30Z",
    "who": "root (unix socket)",
    "what": "Host h1",
    "change": "fenced",
}


@pytest.fixture
def dispatcher(tmp_path: Path) -> Iterator[Dispatcher]:
    with on_a_socket(tmp_path / "api.sock", Dispatcher()) as fake:
        yield fake


def test_audit(run: Run, dispatcher: Dispatcher) -> None:
    items = [ENTRY, {**ENTRY, "revision": 7, "who": "token \x1b[31m\n", "change": {"from": 1}}]
    dispatcher.answers["GET", "/v1/audit"] = (200, {"items": items})
    code, out, _ = run("audit")
    assert code == 0 and out.splitlines() == [
        "REVISION   AT                     WHO                  WHAT      CHANGE",
        r'7          2026-11-23T18:47:30Z   token \x1b[31m\n     Host h1   {"from": 1}',
        "8          2026-11-23T18:47:30Z   root (unix socket)   Host h1   fenced",
    ]
    found = run("audit", "--since", "6", "--limit", "9", "-o", "json")[1]
    assert json.loads(found)["items"] == items[::-1]
    assert [path for _, path, _ in dispatcher.asked] == ["/v1/audit?limit=50", "/v1/audit?limit=9&since=6"]
    dispatcher.answers["GET", "/v1/audit"] = (200, {"items": []})
    assert run("audit")[1] == "no change yet\n" and run("audit", "--since", "6")[1] == "no change since revision 6\n"
