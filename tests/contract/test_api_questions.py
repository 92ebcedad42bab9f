# The operators' API of a real dispatcher process: what is served and written down, what is answered to questions and
# bodies that make sense, and to those that do not.
from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from api_rig import Served, errors, status_of

from dispatcher.api.openapi import DOCUMENT
from dispatcher.api.routes import Routes
from slash32.keys import load_or_create_key

ANYTHING: Any = None


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
        ("/v1/apply?dryrun=1", "?dryrun: unknown query parameter (known here: dry_run, wait)"),
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
