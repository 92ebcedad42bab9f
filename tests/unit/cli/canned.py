# A small real HTTP server, on a Unix socket or behind TLS, that answers as it is told to; and the command line for it.
from __future__ import annotations

import json
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from slash32.cli.__main__ import main

Answer = tuple[int, Any]  # status; plain data, or bytes as they are
Run = Callable[..., tuple[int, str, str]]  # exit code, stdout, stderr


class Dispatcher:
    """Answers from a table; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[tuple[str, str], Answer | list[Answer]] = {}

    def answer(self, method: str, path: str, body: Any) -> Answer:
        self.asked.append((method, path, body))
        found = self.answers.get((method, urlsplit(path).path), (404, {"errors": [f"{unquote(path)}: there is none"]}))
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _TlsServer(ThreadingHTTPServer):
    trust: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            with self.trust.wrap_socket(request, server_side=True) as wrapped:
                super().finish_request(wrapped, client_address)
        except OSError:
            pass  # a client that did not like the certificate is what some tests are about


def _handler(fake: Dispatcher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def serve(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fake.headers.append({key.lower(): value for key, value in self.headers.items()})
            status, answer = fake.answer(self.command, self.path, json.loads(content) if content else None)
            payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = do_DELETE = serve

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def _serving(server: socketserver.BaseServer) -> Iterator[None]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        server.shutdown()
        thread.join()


@contextmanager
def on_a_socket(path: Path, fake: Dispatcher) -> Iterator[Dispatcher]:
    with _serving(Server(str(path), _handler(fake))):
        yield fake


@contextmanager
def behind_tls(certificate: Path, key: Path, fake: Dispatcher) -> Iterator[int]:
    """The port."""
    server = _TlsServer(("127.0.0.1", 0), _handler(fake))
    server.trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.trust.load_cert_chain(certificate, key)
    with _serving(server):
        yield server.server_address[1]


def runs(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call
