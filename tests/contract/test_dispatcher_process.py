# The dispatcher as a process, as operators meet it: documents, errors, its files, its commands, systemd.
from __future__ import annotations

import contextlib
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from dispatcher_rig import DB, WEB, Rack, document, policy

# --- operators -------------------------------------------------------------------------------------------------------


def test_apply_is_all_or_nothing(rack: Rack) -> None:
    rack.begin(1)
    good, bad = policy("good", WEB, WEB), policy("bad", "role = web", WEB)
    status, body = rack.dispatcher.call("POST", "/v1/apply", {"documents": [good, bad, {"kind": "Nope"}]})
    assert status == 400 and len(body["errors"]) == 2 and all("\n" not in e for e in body["errors"])
    assert "GlobalNetworkPolicy bad: spec.selector" in body["errors"][0]
    assert rack.dispatcher.get("/v1/resources/GlobalNetworkPolicy") == {"items": []}
    revision = rack.dispatcher.get("/v1/status")["revision"]
    status, body = rack.dispatcher.call("POST", "/v1/apply?dry_run=1", {"documents": [good]})
    assert (status, body["revision"]) == (200, revision)
    assert body["changes"] == [{"kind": "GlobalNetworkPolicy", "name": "good", "change": "created"}]
    assert rack.dispatcher.get("/v1/resources/gnp") == {"items": []}
    assert rack.dispatcher.apply(good) == revision + 1
    assert rack.dispatcher.apply(good) == revision + 1, "unchanged: no revision"
    found = rack.dispatcher.get("/v1/resources/gnp/good")
    assert found["spec"]["selector"] == WEB
    _, body = rack.dispatcher.call("POST", "/v1/apply", {"documents": [policy("good", DB, WEB)]})
    assert body["changes"][0]["change"] == "configured"


def test_two_hosts_cannot_have_one_key_or_one_address(rack: Rack) -> None:
    h1 = rack.begin(1)[0]
    for spec in ({"publicKey": h1.keys.public}, {"addresses": h1.resource()["spec"]["addresses"]}):
        status, body = rack.dispatcher.call("POST", "/v1/apply", {"documents": [document("Host", "h2", **spec)]})
        assert status == 400 and "h1" in body["errors"][0]
    rack.dispatcher.apply(document("Host", "h2", addresses=["192.0.2.77"]))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1/resources/cats", None, 404),
        ("GET", "/v1/resources/gnp/no", None, 404),
        ("DELETE", "/v1/resources/gnp/no", None, 404),
        ("PUT", "/v1/status", None, 405),
        ("POST", "/v1/apply", [], 400),
        ("POST", "/v1/apply", {"documents": [], "more": 1}, 400),
        ("POST", "/v1/apply", {"documents": ["x", 1, None]}, 400),
        ("POST", "/v1/apply?dry_run=maybe", {"documents": []}, 400),
        ("GET", "/v1/revisions/x", None, 404),
        ("GET", "/v1/revisions/0?wait=nan", None, 400),
        ("GET", "/v1/revisions/0?wait=-1", None, 400),
    ],
)
def test_errors_are_json_lines(one: Rack, method: str, path: str, body: object, status: int) -> None:
    found, answer = one.dispatcher.call(method, path, body)
    assert found == status and answer["errors"] and all("\n" not in e for e in answer["errors"])


def test_bodies_are_bounded_and_nonsense_is_refused(one: Rack) -> None:
    def post(body: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(20)
            s.connect(str(one.dispatcher.socket))
            head = f"POST /v1/apply HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            s.sendall(head.encode())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused while it was still sent
                s.sendall(body)
            return s.recv(200)

    assert b" 413 " in post(b"[" * (33 << 20))
    assert b" 400 " in post(b"[" * 1_000_000)
    assert b" 400 " in post(b"\xff\xfe")
    assert one.dispatcher.answers()


def test_socket_and_key_are_private(one: Rack) -> None:
    mode = one.dispatcher.socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and mode & 0o777 == 0o660
    assert (one.dispatcher.folder / "d.key").stat().st_mode & 0o777 == 0o600


def test_commands(one: Rack) -> None:
    def run(verb: str) -> subprocess.CompletedProcess[str]:
        return one.dispatcher.run(verb)

    assert run("key").stdout.strip() == one.dispatcher.public_key
    assert run("status").stdout.startswith("revision ")
    second = run("run")
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1 and "another dispatcher" in second.stderr
    assert run("nonsense").returncode == 2
    assert "examples:" in run("--help").stdout
    good = one.dispatcher.config.read_text()
    one.dispatcher.config.write_text('listen = "udp://x"\n')
    bad = run("run")
    one.dispatcher.config.write_text(good)
    assert bad.returncode == 2 and "listen" in bad.stderr and len(bad.stderr.splitlines()) == 1


def test_a_corrupt_database_is_one_line_and_exit_1(rack: Rack) -> None:
    rack.dispatcher.database.write_bytes(b"\0garbage" * 1000)
    done = rack.dispatcher.run("run")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and str(rack.dispatcher.database) in done.stderr


def test_systemd_is_told_and_sigterm_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rack = Rack(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        try:
            rack.begin(1)
            assert notify.recv(100) == b"READY=1"
            assert notify.recv(100) == b"WATCHDOG=1"
            assert rack.dispatcher.process
            rack.dispatcher.process.send_signal(signal.SIGTERM)
            while (word := notify.recv(100)) != b"STOPPING=1":
                assert word == b"WATCHDOG=1"
            assert rack.dispatcher.process.wait(10) == 0
            assert not rack.dispatcher.socket.exists()
        finally:
            rack.end()
