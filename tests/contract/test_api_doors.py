# Who gets in to the operators' API: the Unix socket, TCP with TLS and tokens, health and metrics, and clients that are
# slow or silent.
from __future__ import annotations

import asyncio
import contextlib
import grp
import http.client
import os
import re
import socket
import ssl
import stat
from pathlib import Path

import pytest
from api_rig import Served, certificate, complaint, errors, network, pieces, status_of
from dispatcher_rig import Dispatcher, until

from dispatcher.api import gate, listening

# --- the Unix socket -------------------------------------------------------------------------------------------------


def test_the_socket_is_its_group_s(fresh: Dispatcher) -> None:
    group = grp.getgrgid(os.getgroups()[0] if os.getgroups() else os.getgid()).gr_name
    with fresh.config.open("a") as config:
        config.write(f'socket_group = "{group}"\n')
    fresh.start()
    is_now = fresh.socket.stat()
    assert stat.S_ISSOCK(is_now.st_mode) and is_now.st_mode & 0o777 == 0o660
    assert is_now.st_gid == grp.getgrnam(group).gr_gid


def test_a_group_that_is_not_there(fresh: Dispatcher) -> None:
    with fresh.config.open("a") as config:
        config.write('socket_group = "no-such-group"\n')
    assert "socket_group: there is no group no-such-group here" in complaint(fresh)
    assert not fresh.socket.exists()


def test_a_socket_that_is_somebody_s(fresh: Dispatcher, tmp_path: Path) -> None:
    fresh.socket.write_text("precious")
    assert "is not a socket" in complaint(fresh)
    assert fresh.socket.read_text() == "precious"
    fresh.socket.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(fresh.socket))
        other.listen()
        assert "another dispatcher serves the API there" in complaint(fresh)
        assert fresh.socket.exists()
    fresh.start()  # the control: what one that is gone has left


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "192.0.2.1", True),
    ],
)
def test_whose_connections_are_counted_together(one: str, other: str, same: bool) -> None:
    a, b = (listening._counted(gate.Peer(address=each)) for each in (one, other))
    assert (a == b) is same


def test_the_audit_log_knows_who(served: Served) -> None:
    served.apply(network("mine", "192.0.2.0/24"))
    status, _ = served.tcp("DELETE", "/v1/resources/gns/mine", served.tokens["admin"])
    assert status == 200
    last, before = served.get("/v1/audit?limit=2")["items"]
    assert (last["who"], last["what"]) == ("token ci-admin from 127.0.0.1", "GlobalNetworkSet mine")
    assert before["who"].endswith(" (unix socket)") and before["who"].startswith("root" if os.getuid() == 0 else "")
    assert last["revision"] == before["revision"] + 1
    assert served.get(f"/v1/audit?since={before['revision']}")["items"] == [last]


# --- TCP -------------------------------------------------------------------------------------------------------------


def test_tokens_and_roles(served: Served) -> None:
    ro, admin = served.tokens["ro"], served.tokens["admin"]
    for token in ("", "s32_wrong", ro + "x", ro[:-1]):
        errors(served.tcp("GET", "/v1/status", token), 401)
        errors(served.tcp("GET", "/v1/nothing", token), 401)
        errors(served.tcp("GET", "/health", token), 401)
    for odd in ("Basic eDp5", "Bearer", f"Token {ro}", f"bearer\t{ro}"):
        errors(served.tcp("GET", "/v1/status", "", Authorization=odd), 401)
    assert served.tcp("GET", "/v1/status", "", Authorization=f"bearer {ro}")[0] == 200
    for path in ("/v1/status", "/v1/audit", "/v1/hosts", "/v1/openapi.json", "/health", "/metrics"):
        assert served.tcp("GET", path, ro)[0] == 200, path
        assert served.tcp("GET", path, admin)[0] == 200, path
    for asked in ("GET /v1/backup", "POST /v1/apply", "DELETE /v1/resources/gnp/x", "POST /v1/ask"):
        method, path = asked.split()
        assert "ci-ro" in errors(served.tcp(method, path, ro), 403)
    assert served.tcp("GET", "/v1/backup", admin)[0] == 200
    assert served.tcp("POST", "/v1/apply", admin, {"documents": []})[0] == 200


def test_a_refused_client_need_not_have_its_body_read(served: Served) -> None:
    with tls(served, served.context()) as s:
        s.sendall(b"POST /v1/apply HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        assert status_of(s.recv(4096)) == 401


def test_the_token_file_is_read_again(served: Served) -> None:
    later = served.token("later", "ro")
    assert served.tcp("GET", "/v1/status", later)[0] == 200
    good = served.token_file.read_text()

    def refused() -> None:
        errors(served.tcp("GET", "/v1/status", later), 401)
        errors(served.tcp("GET", "/v1/status", served.tokens["admin"]), 401)

    try:
        served.token_file.write_text(good + "broken\n")
        refused()
        served.token_file.write_text(good)
        assert served.tcp("GET", "/v1/status", later)[0] == 200
        served.token_file.chmod(0o664)
        refused()
        served.token_file.chmod(0o644)
        assert served.tcp("GET", "/v1/status", later)[0] == 200
        served.token_file.unlink()
        refused()
        served.token_file.write_text("".join(line for line in good.splitlines(True) if "later" not in line))
        errors(served.tcp("GET", "/v1/status", later), 401)
        assert served.tcp("GET", "/v1/status", served.tokens["admin"])[0] == 200
    finally:
        served.token_file.write_text(good)
    assert served.call("GET", "/v1/status")[0] == 200
    assert "lets others add tokens" in served.log.read_text()


def test_a_token_is_nowhere(served: Served) -> None:
    for token in served.tokens.values():
        assert len(token) > 40 and token not in served.token_file.read_text() and token not in served.log.read_text()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_only_tls_and_not_its_old_versions(served: Served) -> None:
    old = served.context()
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError):
        tls(served, old)
    hello = b"\x16\x03\x01\x02\x00"
    for words in (b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(2000), hello + os.urandom(512), hello):
        with socket.create_connection(("127.0.0.1", served.api_port), 20) as s:
            s.sendall(words)
            s.shutdown(socket.SHUT_WR)
            assert b"HTTP" not in b"".join(pieces(s))
    assert served.tcp("GET", "/v1/status", served.tokens["ro"])[0] == 200
    assert served.quiet()


def test_few_connections_of_one_address(served: Served) -> None:
    """Silent ones, before TLS even; the Unix socket does not notice, and when they go there is room again."""
    held = [socket.create_connection(("127.0.0.1", served.api_port), 20) for _ in range(80)]
    ended = 0
    for s in held[64:]:
        ended += s.recv(1) == b""
    assert ended == 16
    assert served.answers()
    for s in held:
        s.close()
    until(lambda: gets_in(served))


def tls(served: Served, context: ssl.SSLContext) -> ssl.SSLSocket:
    s = socket.create_connection(("127.0.0.1", served.api_port), 20)
    return context.wrap_socket(s, server_hostname="127.0.0.1")


def gets_in(served: Served) -> bool:
    try:
        return served.tcp("GET", "/v1/status", served.tokens["ro"])[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_health_and_metrics_alone_without_a_token(served: Served) -> None:
    assert served.measured("GET", "/health") == (200, {"status": "ok", "problems": []})
    status, text = served.measured("GET", "/metrics")
    assert status == 200 and b'\nslash32_dispatcher_api_requests_total{code="401"} ' in text
    for path in ("/v1/status", "/v1/openapi.json", "/v1/backup", "/"):
        errors(served.measured("GET", path), 404)
    errors(served.measured("POST", "/metrics"), 405)


def test_a_renewed_certificate(served: Served) -> None:
    before = served.context()
    certificate(served.folder)
    connection = http.client.HTTPSConnection("127.0.0.1", served.api_port, timeout=20, context=before)
    with pytest.raises(ssl.SSLCertVerificationError):
        connection.connect()
    assert served.tcp("GET", "/v1/status", served.tokens["ro"])[0] == 200
    good = served.cert.read_text()
    served.cert.write_text("broken")
    try:
        unchecked = ssl.create_default_context()
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
        tls(served, unchecked).close()
    finally:
        served.cert.write_text(good)
    assert "the old certificate stays in use" in served.log.read_text()


@pytest.mark.parametrize(
    ("setting", "piece"),
    [
        ("api_tokens", "cannot be read"),
        ("api_cert", "cannot be read"),
        ("api_key", "cannot be read"),
        ("api_listen", "cannot listen on https://192.0.2.1:5533"),
        ("metrics_listen", "cannot listen on http://192.0.2.1:5533"),
        ("open key", "lets everybody read the key"),
        ("no key", "not a certificate and its key"),
        ("open tokens", "lets others add tokens"),
    ],
)
def test_it_does_not_start_half(setting: str, piece: str, tmp_path: Path) -> None:
    served = Served(tmp_path)
    text = served.config.read_text()
    match setting:
        case "open key":
            (tmp_path / "api.pem").chmod(0o604)
        case "no key":
            (tmp_path / "api.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
        case "open tokens":
            served.token_file.chmod(0o622)
        case _:
            wrong = {"api_listen": "https://192.0.2.1:5533", "metrics_listen": "http://192.0.2.1:5533"}
            instead = f'{setting} = "{wrong.get(setting, tmp_path / "none")}"'
            served.config.write_text(re.sub(rf"{setting} = .*", instead, text))
    assert piece in complaint(served) and not served.socket.exists()


# --- slow and silent clients -----------------------------------------------------------------------------------------


class Silent(asyncio.Protocol):
    pass


@pytest.mark.parametrize("words", [b"", b"GET /v1/status HTTP/1.1\r\nX: "])
def test_who_does_not_finish_its_question_is_let_go(words: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte does not begin its time anew."""
    monkeypatch.setattr(gate, "PATIENCE", 0.3)

    async def run() -> bool:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        kept = gate.Gate(Silent(), gate.Peer("x"), lambda: None)
        await loop.connect_accepted_socket(lambda: kept, ours)
        theirs.setblocking(False)
        while not kept.lost.is_set():
            with contextlib.suppress(OSError):
                await loop.sock_sendall(theirs, words[:1])
            await asyncio.sleep(0.02)
        theirs.close()
        return True

    assert asyncio.run(asyncio.wait_for(run(), 20))


def test_who_is_being_answered_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a question that takes us long, and a client that takes its answer slowly."""
    monkeypatch.setattr(gate, "PATIENCE", 0.2)

    async def run() -> int:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        kept = gate.Gate(Silent(), gate.Peer("x"), lambda: None)
        transport, _ = await loop.connect_accepted_socket(lambda: kept, ours)
        theirs.setblocking(False)
        kept.begin()
        await asyncio.sleep(0.5)
        assert not kept.lost.is_set()
        transport.write(bytes(8 << 20))
        kept.end()
        taken = 0
        while not kept.lost.is_set() and taken < 8 << 20:
            taken += len(await loop.sock_recv(theirs, 256 << 10))
            await asyncio.sleep(0.05)
        theirs.close()
        return taken

    assert asyncio.run(asyncio.wait_for(run(), 30)) == 8 << 20


def test_ports_are_free_again(tmp_path: Path) -> None:
    """A restart is no reason to wait."""
    served = Served(tmp_path)
    for _ in range(2):
        served.start()
        assert served.tcp("GET", "/v1/status", served.tokens["ro"])[0] == 200
        assert served.stop() == 0
        assert not served.socket.exists()
