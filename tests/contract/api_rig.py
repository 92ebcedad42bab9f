# A dispatcher process that serves its API everywhere: Unix socket, TCP with TLS and tokens, metrics. And clients that
# are not polite.
from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispatcher_rig import PATIENCE, REPO, Dispatcher, document, free_port


def certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "api.crt", folder / "api.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    key.chmod(0o600)
    return cert, key


class Served(Dispatcher):
    """`tokens` by role."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.api_port, self.metrics_port = free_port(), free_port()
        self.cert, key = certificate(folder)
        self.token_file = folder / "tokens"
        with self.config.open("a") as config:
            config.write(
                f'api_listen = "https://127.0.0.1:{self.api_port}"\napi_cert = "{self.cert}"\napi_key = "{key}"\n'
                f'api_tokens = "{self.token_file}"\nmetrics_listen = "http://127.0.0.1:{self.metrics_port}"\n'
            )
        self.tokens = {role: self.token(f"ci-{role}", role) for role in ("ro", "admin")}

    def token(self, name: str, role: str) -> str:
        command = [*self.command("token"), name, "--role", role]
        done = subprocess.run(command, check=True, cwd=REPO, capture_output=True, text=True)
        return done.stdout.strip()

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.cert))

    def tcp(self, method: str, path: str, token: str = "", body: object = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPSConnection("127.0.0.1", self.api_port, timeout=PATIENCE, context=self.context())
        if token:
            headers["Authorization"] = f"Bearer {token}"
        return _asked(connection, method, path, None if body is None else json.dumps(body), headers)

    def measured(self, method: str, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=PATIENCE)
        return _asked(connection, method, path, None, {})

    def plugged(self) -> socket.socket:
        return plugged(self)

    def said(self, request: bytes, shut: bool = False) -> bytes:
        """All that is answered until the connection ends."""
        with self.plugged() as s:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                s.sendall(request)
                if shut:
                    s.shutdown(socket.SHUT_WR)
            return b"".join(pieces(s))

    def post(self, path: str, body: bytes, *head: bytes) -> bytes:
        lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: x", b"Connection: close", *head]
        if not any(line.lower().startswith((b"content-length", b"transfer")) for line in head):
            lines.append(b"Content-Length: %d" % len(body))
        return self.said(b"\r\n".join(lines) + b"\r\n\r\n" + body)

    def quiet(self) -> bool:
        """It lives, and nothing that it logged is an error of its own."""
        text = self.log.read_text()
        return self.answers() and "Traceback" not in text and "ERROR" not in text


def _asked(
    connection: http.client.HTTPConnection, method: str, path: str, body: str | None, headers: dict[str, str]
) -> tuple[int, Any]:
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
        return answer.status, json.loads(content) if is_json and content else content
    finally:
        connection.close()


def pieces(s: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(ConnectionResetError, TimeoutError):
        while piece := s.recv(65536):
            yield piece


def plugged(dispatcher: Dispatcher) -> socket.socket:
    """A connection to the Unix socket, on which anything may be said."""
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(PATIENCE)
    s.connect(str(dispatcher.socket))
    return s


class Watch:
    """GET /v1/watch, event by event."""

    def __init__(self, served: Dispatcher, query: str = "", **headers: str) -> None:
        self._socket = plugged(served)
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self._socket.sendall(f"GET /v1/watch{query} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
        self.response = http.client.HTTPResponse(self._socket)
        self.response.begin()
        self.status = self.response.status

    def event(self) -> dict[str, str]:
        """The next one that says something."""
        found: dict[str, str] = {}
        while line := self.response.readline():
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field:
                found[field] = value
            elif "data" in found:
                return found
            else:
                found = {}
        raise EOFError

    def commit(self) -> dict[str, Any]:
        event = self.event()
        data: dict[str, Any] = json.loads(event["data"])
        assert int(event["id"]) == data["revision"]
        return {"event": event["event"], **data}

    def close(self) -> None:
        self.response.close()
        self._socket.close()


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


def complaint(dispatcher: Dispatcher) -> str:
    """Of one that does not start."""
    done = dispatcher.run("run")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("slash32-dispatcher:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return line
