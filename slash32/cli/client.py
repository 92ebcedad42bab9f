# Owns: the CLI's side of the operators' API: HTTP + JSON over the dispatcher's Unix socket. Every failure is one line.
from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote as url_quote

from slash32.errors import Slash32Error, printable, quoted, visible

Json = dict[str, Any]
MAX_ANSWER = 256 * 1024 * 1024


class CallError(Slash32Error):
    """The dispatcher refused or did not answer. `lines` are for the user, one complaint each."""

    def __init__(self, lines: list[str], status: int = 0) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.status = status  # HTTP; 0: no answer


class Client:
    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.path = path
        self.timeout = timeout

    def get(self, *parts: str, wait: float = 0.0, query: str = "") -> Json:
        return self._call("GET", _url(parts, query), None, wait)

    def items(self, *parts: str) -> list[Json]:
        found = self.get(*parts).get("items")
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise CallError([f"{self._where()}: answered {'/'.join(parts)} without a list of items"])
        return found

    def post(self, *parts: str, body: Mapping[str, object], query: str = "") -> Json:
        return self._call("POST", _url(parts, query), body, 0.0)

    def delete(self, *parts: str) -> Json:
        return self._call("DELETE", _url(parts, ""), None, 0.0)

    def _call(self, method: str, url: str, body: Mapping[str, object] | None, wait: float) -> Json:
        connection = _UnixConnection(self.path, self.timeout + wait)
        try:
            self._connect(connection)
            try:
                payload = None if body is None else json.dumps(body, allow_nan=False).encode()
                connection.request(method, url, payload, {"Content-Type": "application/json"} if payload else {})
                response = connection.getresponse()
                status, content = response.status, response.read(MAX_ANSWER)
                if response.length:  # what is still missing
                    raise http.client.IncompleteRead(content, response.length)
            except (OSError, http.client.HTTPException) as error:
                unknown = "" if method == "GET" else "; it may have done it or not: run this again"
                raise CallError([f"{self._where()}: {self._lost(error, wait)}{unknown}"]) from None
            return self._answer(status, content)
        finally:
            connection.close()

    def _connect(self, connection: _UnixConnection) -> None:
        try:
            connection.connect()
        except FileNotFoundError:
            why = f"there is no such socket; {_HINT}" if self.path else "give the path of a socket"
        except ConnectionRefusedError:
            why = f"nobody listens there; {_HINT}"
        except PermissionError:
            why = "permission denied; run this as root, or join group slash32"
        except OSError as error:
            why = printable(error.strerror or str(error))
        else:
            return
        raise CallError([f"{self._where()}: {why}"])

    def _lost(self, error: Exception, wait: float) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer for {self.timeout + wait:.0f} s"
        if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | ConnectionError):
            return "it ended before it had answered"
        if isinstance(error, http.client.HTTPException):
            return f"whoever listens there is no dispatcher ({printable(str(error))[:100] or type(error).__name__})"
        return printable(str(error))

    def _answer(self, status: int, content: bytes) -> Json:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise CallError([f"{self._where()}: answered {status} with something that is not JSON"], status)
        if 200 <= status < 300:
            return answer
        errors = answer.get("errors")
        lines = [visible(str(line)) for line in errors] if isinstance(errors, list) and errors else []
        raise CallError(lines or [f"{self._where()}: answered {status} and no reason"], status)

    def _where(self) -> str:
        return f"the dispatcher at {quoted(self.path)}"


_HINT = "is slash32-dispatcher running here? (another socket: --socket or SLASH32_SOCKET)"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        if not self._path:
            raise FileNotFoundError
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _url(parts: tuple[str, ...], query: str) -> str:
    for part in parts:
        if not part or not part.isprintable() or part in (".", ".."):
            raise CallError([f"{quoted(part, 64)}: nothing has such a name"])
    path = "/v1/" + "/".join(url_quote(part, safe="") for part in parts)
    return f"{path}?{query}" if query else path
