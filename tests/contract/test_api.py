# The operators' API of a real dispatcher process: who gets in, what is answered, what is watched, and clients that mean
# no good.
from __future__ import annotations

import asyncio
import base64
import contextlib
import grp
import http.client
import json
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_rig import Served, Watch, certificate, pieces
from dispatcher_rig import Dispatcher, FakeHost, Rack, document, guest, until

from dispatcher.api import gate, listening
from dispatcher.api.openapi import DOCUMENT
from dispatcher.api.routes import Routes
from slash32.keys import load_or_create_key

ANYTHING: Any = None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("api"))
    served.start()
    yield served
    served.stop()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Dispatcher]:
    fresh = Dispatcher(tmp_path)
    yield fresh
    if fresh.process is not None:
        fresh.stop()


def network(name: str, *nets: str) -> dict[str, Any]:
    return document("GlobalNetworkSet", name, nets=list(nets))


def errors(answer: tuple[int, Any], status: int) -> str:
    """One line each."""
    assert answer[0] == status, answer
    assert list(answer[1]) == ["errors"] and answer[1]["errors"]
    for line in answer[1]["errors"]:
        assert line.isprintable() and len(line) < 1000
    return "\n".join(answer[1]["errors"])


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
    assert found, answer[:200]
    return int(found[1])


# --- what is served and what is written down -------------------------------------------------------------------------


def test_the_document_names_what_is_served_and_nothing_else() -> None:
    class Nothing:
        watch = None

    routes = Routes(ANYTHING, Nothing()).served()  # type: ignore[arg-type]
    written = {
        (method.upper(), path): {p["name"] for p in operation["parameters"] if p["in"] == "query"}
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
    }
    assert written == {(route.method, route.path): set(route.query) for route in routes}
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            named = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path)), path


def test_every_reference_leads_somewhere_and_every_shape_is_used(served: Served) -> None:
    text = json.dumps(served.get("/v1/openapi.json"))
    assert json.loads(text) == DOCUMENT
    asked = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert asked == set(DOCUMENT["components"]["schemas"])


def test_what_is_served_answers(served: Served) -> None:
    """Each route that reads, by its own path: nothing is written down that answers "Not Found"."""
    for path, methods in DOCUMENT["paths"].items():
        if path == "/v1/watch":
            continue
        concrete = path.replace("{kind}", "hosts").replace("{name}", "no").replace("{number}", "0")
        for method in methods:
            said = {} if method == "post" else None
            status, body = served.tcp(method.upper(), concrete, served.tokens["admin"], said)
            assert status in (200, 400, 404) and "Not Found" not in str(body), (path, method)


def test_what_nobody_serves(served: Served) -> None:
    assert "Not Found" in errors(served.call("GET", "/v1/nonsense"), 404)
    assert "Not Found" in errors(served.call("GET", "/"), 404)
    assert "Method Not Allowed" in errors(served.call("PUT", "/v1/status"), 405)
    assert "Method Not Allowed" in errors(served.call("OPTIONS", "/v1/apply"), 405)
    assert b"Allow: GET" in served.said(b"DELETE /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head = served.said(b"HEAD /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert status_of(head) == 405 and head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("path", "piece"),
    [
        ("/v1/status?x=1", "?x: unknown query parameter (there are none here)"),
        ("/v1/apply?dryrun=1", "?dryrun: unknown query parameter (known here: dry_run)"),
        ("/v1/apply?dry_run=1&dry_run=0", "?dry_run is there twice"),
        ("/v1/apply?dry_run=yes", "neither 0 nor 1"),
        ("/v1/revisions/0?wait=-1", "not a number of seconds"),
        ("/v1/revisions/0?wait=nan", "not a number of seconds"),
        ("/v1/revisions/0?wait=601", "not a number of seconds"),
        ("/v1/audit?limit=0", "give 1 to"),
        ("/v1/audit?limit=x", "not a whole number"),
        ("/v1/audit?since=-1", "not a whole number"),
        ("/v1/watch?since=9999999999999999999999", "not a whole number"),
        ("/v1/watch?since=%F0%9F%92%A9", "not a whole number"),
        ("/v1/restore?replace=", "neither 0 nor 1"),
    ],
)
def test_questions_that_make_no_sense(path: str, piece: str, served: Served) -> None:
    method = "POST" if "apply" in path or "restore" in path else "GET"
    assert piece in errors(served.call(method, path, {"documents": []} if method == "POST" else None), 400)


# --- bodies ----------------------------------------------------------------------------------------------------------

DEEP = b'{"documents": [' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}"


@pytest.mark.parametrize(
    ("body", "piece"),
    [
        (b"", b"is not {"),
        (b"{", b"not JSON"),
        (b"nonsense", b"not JSON"),
        (b"\xff\xfe{}", b"not UTF-8"),
        (b'{"documents": ["\xc3("]}', b"not UTF-8 text, at byte 16"),
        (b"\xef\xbb\xbf{}", b"not JSON"),
        ('{"documents": []}'.encode("utf-16"), b"not UTF-8"),
        (b'{"documents": [NaN]}', b"NaN is no number"),
        (b'{"documents": [-Infinity]}', b"Infinity is no number"),
        (b'{"documents": [' + b"9" * 10_000 + b"]}", b"not JSON"),
        (b'{"documents": [1e999]}', b"is not a mapping"),
        (b'{"documents": [], "documents": []}', b"same key twice"),
        (b'{"documents": [], "x": 1}', b"x: unknown field; known here: documents"),
        (b'{"documents": {}}', b"is not {"),
        (b'{"documents": [{"apiVersion": "slash32/v1", "kind": "Tier", "\\ud800": 1}]}', b"unknown field"),
        (b"[" * 100_000, b"not JSON"),
        (DEEP, b"more than 64 lists"),
        (b'{"documents": ' + b"[" * 70 + b"]" * 70 + b"}", b"more than 64 lists"),
        (b"[]", b"is not a mapping"),
        (b"null", b"is not a mapping"),
    ],
)
def test_bodies_that_make_no_sense(body: bytes, piece: bytes, served: Served) -> None:
    answer = served.post("/v1/apply", body)
    assert status_of(answer) == 400 and piece in answer, answer[:2000]
    assert served.quiet()


def test_bodies_that_make_sense(served: Served) -> None:
    """The control."""
    assert status_of(served.post("/v1/apply", b' {"documents": [] } ')) == 200
    assert status_of(served.post("/v1/apply", b"11\r\n" + b'{"documents": []}' + b"\r\n0\r\n\r\n",
                                 b"Transfer-Encoding: chunked")) == 200  # fmt: skip


def test_bodies_that_are_too_much_or_not_what_they_say(served: Served) -> None:
    assert status_of(served.post("/v1/apply", b"x", b"Content-Length: 99999999999")) == 413
    assert status_of(served.post("/v1/apply", b"[" * (33 << 20))) == 413
    assert status_of(served.post("/v1/apply", b"x", b"Content-Encoding: gzip")) == 415
    chunks = b"100000\r\n" + b"[" * 0x100000 + b"\r\n"
    assert status_of(served.post("/v1/apply", chunks * 33, b"Transfer-Encoding: chunked")) == 413
    head = b"POST /v1/apply HTTP/1.1\r\nHost: x\r\n"
    for cut in (
        head + b'Content-Length: 100\r\n\r\n{"documents',
        head + b'Transfer-Encoding: chunked\r\n\r\n11\r\n{"docu',
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        head + b"X: y\r\n" * 10_000 + b"\r\n",
        b"GET /v1/status\x00 HTTP/1.1\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"GET //// HTTP/1.1\r\n\r\n",
        b"GET /v1/resources/%ff%fe HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /v1/resources/%zz HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /v1/resources/\xff HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        os.urandom(5000),
    ):
        answer = served.said(cut, shut=True)
        assert not answer or 400 <= status_of(answer) < 500, (cut[:80], answer[:300])
    assert served.quiet()


def test_many_questions_at_once(served: Served) -> None:
    """Said without waiting for answers; all are answered, in their order."""
    one = b"GET /v1/revisions/0 HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = served.said(one * 100 + last)
    assert [int(each) for each in re.findall(rb"HTTP/1.1 (\d+) ", answer)] == [200] * 100 + [404]
    assert served.quiet()


def test_who_says_on_and_on_is_cut_off(served: Served) -> None:
    """Also while its first question waits for the answer: nothing is kept for it without end."""
    host = f"h{os.getpid()}"
    key = load_or_create_key(served.folder / "nobody.key").public
    revision = served.call("POST", "/v1/hosts", {"name": host, "publicKey": key})[1]["revision"]
    for upgrade in (b"", b"Connection: upgrade\r\nUpgrade: websocket\r\n"):
        with served.plugged() as s:
            s.sendall(b"GET /v1/revisions/%d?wait=60 HTTP/1.1\r\nHost: x\r\n%s\r\n" % (revision, upgrade))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(1000):
                    s.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
    assert served.call("DELETE", f"/v1/resources/Host/{host}")[0] == 200
    assert served.quiet()


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


def complaint(dispatcher: Dispatcher) -> str:
    """Of one that does not start."""
    done = dispatcher.run("run")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("slash32-dispatcher:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return line


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


# --- watching --------------------------------------------------------------------------------------------------------


def test_watch(served: Served) -> None:
    watch = Watch(served)
    assert watch.status == 200 and watch.response.getheader("Content-Type") == "text/event-stream"
    revision = served.apply(network("seen", "192.0.2.0/24"))
    event = watch.commit()
    (change,) = event.pop("changes")
    assert event == {"event": "commit", "revision": revision}
    assert (change["kind"], change["name"], change["change"]) == ("GlobalNetworkSet", "seen", "put")
    assert change["object"] == served.get("/v1/resources/gns/seen")
    served.call("DELETE", "/v1/resources/gns/seen")
    assert watch.commit() == {
        "event": "commit",
        "revision": revision + 1,
        "changes": [{"kind": "GlobalNetworkSet", "name": "seen", "change": "deleted"}],
    }
    watch.close()


def test_watch_resumes(served: Served) -> None:
    first = served.apply(network("a", "192.0.2.0/24"))
    served.apply(network("b", "192.0.2.0/24"))
    for watch in (
        Watch(served, f"?since={first - 1}"),
        Watch(served, Last_Event_ID=str(first - 1)),
        Watch(served, "?since=0", Last_Event_ID=str(first - 1)),
    ):
        assert [watch.commit()["revision"] for _ in range(2)] == [first, first + 1]
        watch.close()
    live = Watch(served, f"?since={first + 1}")
    after = served.apply(network("c", "192.0.2.0/24"))
    assert live.commit()["revision"] == after, "nothing twice"
    live.close()
    future = Watch(served, f"?since={after + 1000}")
    assert future.commit() == {"event": "reset", "revision": after}
    future.close()


def test_watch_sees_endpoints(tmp_path: Path) -> None:
    rack = Rack(tmp_path)
    try:
        (h1,) = rack.begin(1)
        watch = Watch(rack.dispatcher)
        h1.claim(guest(1))
        rack.until(lambda: rack.dispatcher.get("/v1/endpoints")["items"])
        (endpoint,) = rack.dispatcher.get("/v1/endpoints")["items"]
        del endpoint["effectiveLabels"]
        (change,) = watch.commit()["changes"]
        name = f"{endpoint['uuid']}/{endpoint['mac']}"
        assert change == {"kind": "Endpoint", "name": name, "change": "put", "object": endpoint}
        h1.release(guest(1).key)
        rack.until(lambda: not rack.dispatcher.get("/v1/endpoints")["items"])
        assert watch.commit()["changes"] == [{"kind": "Endpoint", "name": name, "change": "deleted"}]
        watch.close()
    finally:
        rack.end()


def test_too_late_begins_anew(served: Served) -> None:
    begun = served.apply(network("late", "192.0.2.0/24"))
    for number in range(1030):
        last = served.apply(network("late", f"10.{number >> 8}.{number & 255}.0/24"))
    old = Watch(served, f"?since={begun}")
    assert old.commit() == {"event": "reset", "revision": last}
    now = served.apply(network("late", "192.0.2.0/24"))
    assert old.commit()["revision"] == now
    old.close()


def test_a_watcher_that_takes_nothing_is_cut_off(served: Served) -> None:
    assert served.process
    slow, quick = Watch(served), Watch(served)
    nets = [f"10.{n >> 8}.{n & 255}.0/24" for n in range(20_000)]
    for number in range(60):
        last = served.apply(network("big", *nets, f"11.0.{number}.0/24"))
        assert quick.commit()["revision"] == last
    quick.close()
    with pytest.raises((EOFError, OSError, http.client.HTTPException)):
        while True:
            slow.event()
    slow.close()
    assert served.quiet()


def test_at_most_256_watch(served: Served) -> None:
    watches = [Watch(served) for _ in range(256)]
    try:
        assert Watch(served).status == 503
    finally:
        for watch in watches:
            watch.close()
    until(lambda: (again := Watch(served)).status == 200 and again.close() is None)


def test_watchers_do_not_keep_it_from_ending(fresh: Dispatcher, tmp_path: Path) -> None:
    fresh.start()
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(fresh.socket))
        s.settimeout(20)
        s.sendall(b"GET /v1/watch HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"retry" in b"".join(s.recv(4096) for _ in range(2))
        assert fresh.stop() == 0
        assert b"".join(pieces(s)).endswith(b"0\r\n\r\n")


# --- backups ---------------------------------------------------------------------------------------------------------


def test_backup_and_restore(served: Served, fresh: Dispatcher) -> None:
    host = FakeHost(served, "h77")
    served.apply(host.resource(), network("kept", "192.0.2.0/24"), document("Tier", "first", order=1))
    backup = served.get("/v1/backup")
    assert (backup["slash32Backup"], backup["revision"]) == (1, served.get("/v1/status")["revision"])
    fresh.start()
    assert fresh.call("POST", "/v1/restore", backup)[0] == 200
    for kind in ("gns", "tiers", "hosts"):
        assert fresh.get(f"/v1/resources/{kind}") == served.get(f"/v1/resources/{kind}")
    assert fresh.get("/v1/audit?limit=1")["items"][0]["change"] == "restored"
    assert errors(fresh.call("POST", "/v1/restore", backup), 409)
    fresh.apply(network("more", "192.0.2.0/24"))
    assert fresh.call("POST", "/v1/restore?replace=1", backup)[0] == 200
    assert fresh.get("/v1/resources/gns") == served.get("/v1/resources/gns")
    served.call("DELETE", "/v1/resources/Host/h77")


def test_a_restore_is_watched(served: Served) -> None:
    backup = served.get("/v1/backup")
    watch = Watch(served)
    served.apply(network("odd", "192.0.2.0/24"))
    assert watch.commit()["changes"][0]["change"] == "put"
    assert served.call("POST", "/v1/restore?replace=1", backup)[0] == 200
    assert watch.commit()["changes"] == [{"kind": "GlobalNetworkSet", "name": "odd", "change": "deleted"}]
    watch.close()


def test_what_is_no_backup_changes_nothing(served: Served) -> None:
    good = served.get("/v1/backup")
    before = served.get("/v1/status")["revision"]
    row = ["resource", ["Tier", "x"], base64.b64encode(b"{}").decode()]
    odd = ({"x": 1}, {"slash32Backup": 2}, {"records": [row]}, {"epoch": ""}, {"revision": -1}, {"records": [[]]})
    for wrong in ({}, [], *({**good, **each} for each in odd)):
        errors(served.call("POST", "/v1/restore?replace=1", wrong), 400)
    assert served.get("/v1/status")["revision"] == before


# --- hosts, dispatchers ----------------------------------------------------------------------------------------------


def test_hosts(served: Served) -> None:
    keys = [load_or_create_key(served.folder / f"k{n}").public for n in range(2)]
    assert served.call("POST", "/v1/hosts", {"name": "n1", "publicKey": keys[0], "nets": ["10.9.0.0/16"]})[0] == 200
    assert "exists already" in errors(served.call("POST", "/v1/hosts", {"name": "n1", "publicKey": keys[1]}), 409)
    errors(served.call("POST", "/v1/hosts", {"name": "n2"}), 400)
    errors(served.call("POST", "/v1/hosts", {"name": "n2", "publicKey": "short"}), 400)
    errors(served.call("POST", "/v1/hosts", {"name": "n2", "publicKey": keys[1], "mode": 1}), 400)
    assert served.call("POST", "/v1/hosts/n1/rotate", {"publicKey": keys[1]})[0] == 200
    errors(served.call("POST", "/v1/hosts/n1/rotate", {}), 400)
    errors(served.call("POST", "/v1/hosts/none/rotate", {"publicKey": keys[1]}), 404)
    errors(served.call("POST", "/v1/hosts/n1/fence", {"reason": "a\nb"}), 400)
    assert served.call("POST", "/v1/hosts/n1/fence", {"reason": "burnt down"})[0] == 200
    (item,) = [each for each in served.get("/v1/hosts")["items"] if each["name"] == "n1"]
    assert (item["fenced"], item["publicKey"], item["nextPublicKey"]) == ("burnt down", *keys)
    errors(served.call("POST", "/v1/hosts/n1/unfence", {"reason": "x"}), 400)
    assert served.call("POST", "/v1/hosts/n1/unfence")[0] == 200
    errors(served.call("POST", "/v1/hosts/n1/unfence"), 409)
    errors(served.call("DELETE", "/v1/dispatchers/none"), 404)
    assert served.call("DELETE", "/v1/resources/Host/n1")[0] == 200


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
